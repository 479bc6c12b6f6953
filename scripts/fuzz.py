"""Forge many checkpoints and see that only typed errors and true models come of them.

python scripts/fuzz.py --cases 20000 --output benchmarks/results/fuzz.json
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers.utils import logging

from benchmarks.timing import save
from hf_blockprune.runs.environment import environment
from tests.fuzzing import FIXTURES, Damage, check, damages, forge


def main() -> None:
    """Run the cases; the first that does otherwise is shrunk and ends the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    outcomes: Counter[str] = Counter()
    start = time.perf_counter()

    with tempfile.TemporaryDirectory() as parent:

        @settings(
            max_examples=options.cases,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(changes=st.lists(damages, min_size=1, max_size=3), fixture=st.sampled_from(range(len(FIXTURES))))
        def run(changes: list[Damage], fixture: int) -> None:
            forge(Path(parent, "forged"), changes, fixture)
            outcomes[check(Path(parent, "forged"))] += 1

        run()
    result = {
        "cases": sum(outcomes.values()),
        "outcomes": dict(outcomes),
        "seconds": round(time.perf_counter() - start),
    }
    print(json.dumps(result, indent=2))
    if options.output is not None:
        save(options.output, {**result, "environment": environment()})


if __name__ == "__main__":
    main()
