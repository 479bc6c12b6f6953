"""Runs that end at a given point: `python tests/interrupting.py JOB.json`, by itself or with others.

A job's file holds `settings` of a `PruneJob`, `options` of `run_prune`, and perhaps `stop`: the beginning of a part's
name, how often a part that begins so is written before the run ends, and the signal that ends it.
"""

import json
import os
import signal
import sys
from pathlib import Path

from hf_blockprune.errors import BlockPruneError
from hf_blockprune.jobs.prune import PruneJob, run_prune
from hf_blockprune.runs import resume
from hf_blockprune.runs.interruption import interruptible


def say(line):
    print(line, file=sys.stderr, flush=True)


def stop_at(begin, times, name):
    """Let the process that writes a part get a signal right after it is there."""
    write, seen = resume.RunState.write, []

    def watched(self, part, *args, **kwargs):
        write(self, part, *args, **kwargs)
        seen.append(part)
        if sum(p.startswith(begin) for p in seen) == times and part.startswith(begin):
            os.kill(os.getpid(), getattr(signal, name))

    resume.RunState.write = watched


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    # What changes all the time is kept each time.
    resume.SECONDS_BETWEEN, resume.LARGEST_SHARE = 0.0, float("inf")
    # Whoever runs the tests in the background may have had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job.get("stop"):
        stop_at(*job["stop"])
    with interruptible(say):
        try:
            run_prune(PruneJob.read(None, **job["settings"]), **job["options"])
        except BlockPruneError as error:
            say(f"error: {error}")
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
