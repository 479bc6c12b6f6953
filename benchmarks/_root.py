"""Import first: scripts in this folder find each other as `benchmarks.name`, from the folder above.

Python puts a script's own folder first on its path, and transformers would take `kernels.py` in it for the package of
that name.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
