"""Names of the device profiles that come with the package, for completion in a shell: torch is not waited for."""

import runpy
from pathlib import Path

DEVICES_FILE = Path(__file__).parents[1] / "hub/blockprune_devices.py"


def profile_names() -> list[str]:
    """Names of the profiles that come with the package.

    Their file is run by itself: to import it is to import `hub`, whose first act is to import torch.
    """
    return sorted(runpy.run_path(str(DEVICES_FILE))["DEVICES"])
