"""Runs Python in processes that split off this one, which has imported everything before; `forking.py` talks to it."""

import atexit
import faulthandler
import gc
import json
import os
import runpy
import signal
import sys
import threading
import traceback


def become(order):
    """Let this process, which has just split off, be as one that was started with this order."""
    for target, name in enumerate((os.devnull, order["stdout"], order["stderr"])):
        opened = os.open(name, os.O_RDWR | os.O_APPEND | os.O_NOCTTY)
        os.dup2(opened, target)
        os.close(opened)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])


def run(kind, *rest):
    """`python KIND REST`."""
    if kind == "-c":
        sys.argv, sys.path[0] = [kind, *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv, sys.path[0] = list(rest), os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [kind, *rest], os.path.dirname(kind)
        runpy.run_path(kind, run_name="__main__")


def status_of(arguments):
    """Run, and end as Python itself would."""
    try:
        run(*arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def split_off(order):
    """The number of a new process."""
    if process := os.fork():
        return process
    become(order)
    faulthandler.enable()  # whoever aborts it is told where it was
    status = status_of(order["arguments"])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)  # to take all that was imported apart takes a while


def poll(process):
    """The exit status of a process that has ended, or None."""
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def main():
    imports = sys.argv[1]
    sys.path[0] = ""
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported may print
    exec(imports, {"__name__": "imports"})
    gc.freeze()  # or each run would walk through, and so copy, all that was imported
    print("ready", file=answers, flush=True)
    for line in orders:
        order = json.loads(line)
        answer = poll(order["poll"]) if "poll" in order else split_off(order)
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
