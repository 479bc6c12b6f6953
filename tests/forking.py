"""Python processes that begin where what takes long to import is imported already.

Most of what a small run takes is the import of torch and transformers: seconds, for every process. `Forks` imports them
once, in a process that does nothing else, and what is run splits off it. Each run is a process of its own still, with
its own arguments, environment, folder and streams, is killed and interrupted as any other, and imports the package.

Not for tests of imports, nor of what libraries read from the environment while they are imported (HF_HOME and the
like), which is the same in all that splits off one process.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = """
import accelerate, datasets, evaluate, rich.live, rich.progress, rich.table, torch, transformers, typer
from transformers import AutoModelForImageClassification, Trainer, ViTForImageClassification, pipeline
from transformers.models.vit import image_processing_vit
"""
ENVIRONMENT = dict(os.environ)  # before tests change it


@dataclass
class Fork:
    """A run that was started."""

    forks: "Forks"
    pid: int
    arguments: list
    stdout: Path
    stderr: Path
    returncode: int | None = None

    def poll(self):
        """The exit status, negative for a signal's; None while it runs."""
        if self.returncode is None:
            self.returncode = self.forks.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout=300):
        if not self.ended(timeout):
            self.send_signal(signal.SIGABRT)
            self.ended(10)
            self.kill()
            said = self.stderr.read_text().partition("\nExtension modules")[0]
            raise AssertionError(f"still ran after {timeout} s:\n{said[-5000:]}")
        return self.returncode

    def ended(self, timeout):
        """Whether it ends within so many seconds."""
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        return self.poll() is not None

    def send_signal(self, number):
        if self.poll() is None:  # else the number may be another process's by now
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)
        self.ended(60)

    def completed(self, timeout=300):
        """As `subprocess.run` returns it."""
        status = self.wait(timeout)
        return subprocess.CompletedProcess(self.arguments, status, self.stdout.read_text(), self.stderr.read_text())


class Forks:
    """Starts what splits off one process.

    Args:
        imports: code that runs in it once.
        env: its environment, and that of what is run where no other is given.
    """

    def __init__(self, imports=LIBRARIES, env=ENVIRONMENT):
        self.folder = tempfile.TemporaryDirectory()
        # A pool of threads that an import starts would not be in what splits off.
        self.env = {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.env["HF_DATASETS_CACHE"] = f"{self.folder.name}/datasets"
        self.count = 0
        command = [sys.executable, str(ROOT / "tests/fork_server.py"), imports]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # In a session of its own: Ctrl-C is for whoever runs the tests.
        self.server = subprocess.Popen(command, env=self.env, **pipes, text=True, start_new_session=True)
        assert self.server.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
        self.folder.cleanup()

    def ask(self, order):
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments, env=None, cwd=None, stdout=None, stderr=None):
        """Start `python ARGUMENTS`, which are a script's path, -m or -c, and what follows.

        Streams go to files, which may be given by name, as may a terminal.
        """
        arguments = [str(argument) for argument in arguments]
        self.count += 1
        streams = {}
        for name, given in (("stdout", stdout), ("stderr", stderr)):
            streams[name] = Path(given or f"{self.folder.name}/{self.count}.{name}")
            streams[name].touch()
        env = {**(self.env if env is None else env), "OMP_NUM_THREADS": "1"}
        order = {"arguments": arguments, "env": env, "cwd": str(cwd or Path.cwd())}
        order |= {name: str(path) for name, path in streams.items()}
        return Fork(self, self.ask(order), arguments, **streams)

    def run(self, *arguments, timeout=300, **options):
        return self.start(*arguments, **options).completed(timeout)


@functools.cache
def plain_forks():
    """One for all tests of a process that need no environment of their own; `conftest.py` ends it."""
    return Forks()
