"""What a run shows of itself: in a terminal, in the log of a job, and nowhere."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import datasets
import pytest
import transformers.utils.logging

from hf_blockprune.display import screen
from hf_blockprune.display import stages as display
from hf_blockprune.display.stages import part, planned, stage
from hf_blockprune.display.text import clock
from hf_blockprune.hub.blockprune_backends import available_backends
from tests.conftest import RECIPE, write_images
from tests.forking import Forks
from tests.terminals import terminal

PRUNE = ("-m", "hf_blockprune.cli", "prune")
QUICK = ("--block-shape", "8x8", "--samples", "8", "--budget", "flops=0.75")
SWITCHES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
ALONE = {**{k: v for k, v in os.environ.items() if k not in SWITCHES}, "OMP_NUM_THREADS": "1"}  # models are tiny
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


@pytest.fixture(autouse=True)
def _bars_are_allowed(monkeypatch):
    """Whatever the environment says, and a command with --quiet that ran in this process before."""
    for switch in SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    bars = transformers.utils.logging
    enabled = bars.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    bars.enable_progress_bar()
    datasets.enable_progress_bars()
    yield
    if not enabled[0]:
        bars.disable_progress_bar()
    if not enabled[1]:
        datasets.disable_progress_bars()


def in_terminal(forks, *arguments, columns=100, interrupt_at=None, **environment):
    """Run Python with standard error in a terminal, and standard output in a file.

    Returns:
        (exit status, standard output, all that was written to the terminal).
    """
    with terminal(columns, rows=40) as (name, written):
        process = forks.start(*arguments, env={**ALONE, "TERM": "xterm", **environment}, stderr=name)
        try:
            if interrupt_at is not None:
                until(lambda: re.search(interrupt_at, b"".join(written).decode(errors="ignore")))
                process.send_signal(signal.SIGINT)
            status = process.wait()
        finally:
            process.kill()
    return status, process.stdout.read_text(), b"".join(written).decode()


def until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def shown(written):
    """The lines that a terminal shows in the end of what was written to it."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]", written):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d+A", token):
            row -= int(token[2:-1])
        elif not token.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
            column += 1
        else:
            assert token in (SHOW_CURSOR, HIDE_CURSOR) or token.endswith("m"), token
    return [line.rstrip() for line in lines if line.strip()]


def piped(forks, *arguments, **environment):
    done = forks.run(*arguments, env={**ALONE, **environment})
    assert done.returncode == 0, done.stderr
    return done


def stages_of(lines):
    """Names of the stages that lines report, which must be numbered in order, and whose counts must be whole."""
    found = [
        re.fullmatch(r"stage (\d+) of (\d+): ([a-z ]+)(?:, (\d+)(?:/(\d+))? [a-z ]+)?, [\d.:]+( s)?(, .*)?", x)
        for x in lines
    ]
    found = [match for match in found if match]
    assert [int(match[1]) for match in found] == list(range(1, len(found) + 1))
    assert {int(match[2]) for match in found[-1:]} == {len(found)}
    for match in found:
        if match[3] not in ("shrinking", "allocation", "spending"):  # those may settle early
            assert match[4] == match[5] or match[5] is None, match[0]
    return [match[3] for match in found]


CHOOSING = ["shrinking", "allocation"]
PRUNING = [
    "calibration",
    "permutation",
    "saliency",
    "shrinking",
    *CHOOSING,
    "true losses",
    *CHOOSING,
    "spending",
    "refit",
]
COMPARING = ["evaluation of the other model", "evaluation"]
RECOVERING = ["reconstruction", "distillation"]
ALL = ["loading", *PRUNING, *COMPARING, *RECOVERING, *COMPARING, "saving"]


@pytest.fixture(scope="module")
def job(small_folder, images, tmp_path_factory):
    """Arguments of a run with every stage, but for the output."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(
        f"model: {small_folder}\ndataset: {images}\nevaluation: {images}\nblock_shape: [8, 8]\n"
        "budget: {metric: flops, ratio: 0.75}\ncalibration: {samples: 16, batch_size: 4}\n"
        "recovery: {samples: 16, epochs: 2, batch_size: 4}\n"
    )
    return ["--config", recipe]


@pytest.fixture(scope="module")
def in_both(forks, job, tmp_path_factory):
    """The same run in a terminal and in the log of a job that has colours forced on."""
    folder = tmp_path_factory.mktemp("shown")
    terminal = in_terminal(forks, *PRUNE, *job, "--output", folder / "terminal", "--json")
    log = piped(forks, *PRUNE, *job, "--output", folder / "log", "--json", FORCE_COLOR="1")
    return terminal, log


@pytest.mark.slow
def test_a_terminal_shows_every_stage_and_each_reaches_its_total(in_both):
    (status, _, written), _ = in_both
    assert status == 0
    assert stages_of(shown(written)) == ALL
    for name in set(ALL) - {"loading", "saving"}:  # transformers has bars of its own there
        assert re.search(rf"stage \d+ of {len(ALL)}: {name} .*━", written), name
    assert "then " in written
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)
    assert not any("━" in line for line in shown(written))


@pytest.mark.slow
def test_standard_output_holds_json_alone(in_both):
    (_, output, _), log = in_both
    assert json.loads(output)["evaluation"]["num_images"] == 24
    assert json.loads(log.stdout)["evaluation"]["num_images"] == 24


@pytest.mark.slow
def test_a_log_has_a_line_a_stage(in_both):
    log = in_both[1].stderr
    lines = [line for line in log.splitlines() if "stage " in line]
    assert stages_of(lines) == ALL
    assert len(lines) == len(ALL)
    assert "\x1b" not in log
    assert "━" not in log


@pytest.mark.slow
def test_what_is_learned_is_shown_with_loss_and_learning_rate(in_both):
    lines = [line for line in in_both[1].stderr.splitlines() if "reconstruction" in line or "distillation" in line]
    assert len(lines) == 2
    for line in lines:
        assert re.search(r"loss [\d.e-]+, lr [\d.e-]+", line), line


@pytest.mark.slow
def test_quiet_shows_nothing(forks, small_folder, images, tmp_path):
    arguments = [*PRUNE, small_folder, "--dataset", images, "--quiet", "--json", *QUICK]
    status, output, written = in_terminal(forks, *arguments, "--output", tmp_path / "terminal")
    assert (status, written) == (0, "")
    assert json.loads(output)["seconds"]
    assert piped(forks, *arguments, "--output", tmp_path / "log").stderr == ""


@pytest.mark.slow
def test_of_two_processes_one_has_a_display(launch, job, tmp_path):
    done = launch([RECIPE, *job, "--output", tmp_path / "out", "--json"], processes=2)
    assert stages_of(done.stderr.splitlines()) == ALL
    assert sum("stage " in line for line in done.stderr.splitlines()) == len(ALL)


# The display's files alone, without the package's __init__, which takes seconds to import everything else.
LOOP = f"""
import logging, sys, time, types, warnings
package = sys.modules["hf_blockprune"] = types.ModuleType("hf_blockprune")
package.__path__ = [{str(Path(display.__file__).parents[1])!r}]
import transformers
from hf_blockprune.display.stages import planned, stage
"""
SHORT = f"""{LOOP}
with planned(["first", "second"]):
    with stage("first", 10, unit="layers") as bar:
        for number in bar.over(range(10)):
            time.sleep(0.05)
    with stage("second", 4) as bar:
        for number in range(4):
            bar.advance(loss=0.5)
"""


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_switches_of_the_libraries_silence_it(forks, switch):
    """Read when they are imported, so in processes that import them."""
    assert "stage 1 of 2: first, 10/10 layers" in piped(forks, "-c", SHORT).stderr
    with Forks("", env={**ALONE, switch: "1"}) as silent:
        assert piped(silent, "-c", SHORT, **{switch: "1"}).stderr == ""
        assert in_terminal(silent, "-c", SHORT, **{switch: "1"}) == (0, "", "")


@pytest.mark.parametrize(
    "statement",
    [
        "transformers.utils.logging.disable_progress_bar()",
        "import datasets; datasets.disable_progress_bars()",
        "import huggingface_hub.utils; huggingface_hub.utils.disable_progress_bars()",
    ],
)
def test_so_do_their_functions(forks, statement):
    assert piped(forks, "-c", SHORT.replace("with planned", f"{statement}\nwith planned", 1)).stderr == ""


def test_other_ranks_show_nothing(forks):
    assert piped(forks, "-c", SHORT, RANK="1").stderr == ""


def test_what_others_print_meanwhile_stays_whole_above_the_bar(forks):
    code = f"""{LOOP}
logger = transformers.utils.logging.get_logger("transformers.models")  # its handler keeps the stream it was made with
with stage("loop", 30) as bar:
    for number in bar.over(range(30)):
        time.sleep(0.03)
        if number == 10:
            logger.warning("a warning " + 30 * "that is long ")
        if number == 20:
            warnings.warn("[red]another[/nonsense]")
            print("in", "pieces", file=sys.stderr)
            print("a result")
"""
    status, output, written = in_terminal(forks, "-c", code, columns=80)
    assert (status, output) == (0, "a result\n")
    lines = shown(written)
    assert lines[0] == "[transformers] a warning " + (30 * "that is long ").rstrip()
    assert lines[1].endswith("UserWarning: [red]another[/nonsense]")
    assert "in pieces" in lines
    assert re.fullmatch(r"loop, 30/30 steps, [\d.]+ s", lines[-1])
    assert not any("━" in line for line in lines)


def test_streams_and_handlers_are_afterwards_what_they_were(forks):
    code = f"""{LOOP}
handler = logging.StreamHandler()
logging.getLogger().addHandler(handler)
before = sys.stdout, sys.stderr, handler.stream
with stage("loop", 3) as bar:
    assert sys.stderr is not before[1] and handler.stream is sys.stderr
assert (sys.stdout, sys.stderr, handler.stream) == before
"""
    assert in_terminal(forks, "-c", code)[0] == 0


@pytest.mark.parametrize("error", ["raise RuntimeError('it broke')", "interrupt"])
def test_an_error_and_an_interrupt_leave_the_terminal_clean(forks, error):
    code = f"""{LOOP}
with planned(["first", "second"]), stage("first", 100) as bar:
    for number in bar.over(range(100)):
        time.sleep(0.05)
        if number == 10:
            {error if error != "interrupt" else "pass"}
"""
    at = r"\d\d/100 steps" if error == "interrupt" else None
    status, _, written = in_terminal(forks, "-c", code, interrupt_at=at)
    assert status != 0
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)
    lines = shown(written)
    assert re.match(r"stage 1 of 2: first, \d+/100 steps, stopped after", lines[0])
    assert lines[-1] == ("KeyboardInterrupt" if error == "interrupt" else "RuntimeError: it broke")
    assert not any("━" in line for line in lines)


def test_another_live_display_goes_on_around_it(forks):
    code = f"""{LOOP}
from rich.console import Console
from rich.live import Live
with Live("the outer one", console=Console(stderr=True)):
    with stage("inner", 5) as bar:
        for number in bar.over(range(5)):
            time.sleep(0.1)
"""
    status, _, written = in_terminal(forks, "-c", code)
    assert status == 0
    lines = shown(written)
    assert re.fullmatch(r"inner, 5/5 steps, [\d.]+ s", lines[0])
    assert lines[1:] == ["the outer one"]


def test_a_process_that_splits_off_writes_to_the_terminal_itself(forks):
    """It may have been split off while the thread that draws held a lock, which nobody opens there."""
    code = f"""{LOOP}
import os, signal, threading
held, released = threading.Event(), threading.Event()

def hold(live):
    with live._lock, live.console._lock:
        held.set()
        released.wait()

with stage("loop", 3) as bar:
    threading.Thread(target=hold, args=(bar.run.screen._live,)).start()
    held.wait()
    child = os.fork()
    if not child:
        signal.alarm(20)
        print("from the child", file=sys.stderr, flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    released.set()
assert status == 0
"""
    status, _, written = in_terminal(forks, "-c", code)
    assert status == 0
    assert "from the child" in written


def test_a_narrow_terminal_gets_lines_that_fit(forks):
    _, _, written = in_terminal(forks, "-c", SHORT, columns=40)
    drawn = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", written)
    assert all(len(line) <= 40 for line in re.split(r"[\r\n]+", drawn) if "━" in line)


def lines_of(capsys):
    return capsys.readouterr().err.splitlines()


def test_long_stages_say_something_ever_less_often(monkeypatch, capsys):
    monkeypatch.setattr(screen, "FIRST_LINE", 0.05)
    monkeypatch.setattr(display, "TICK", 0.0)
    with stage("long", 1000) as bar:
        until(lambda: bar.advance() or bar.elapsed > 0.9)
    lines = lines_of(capsys)
    assert 3 <= len(lines) <= 6  # after 0.05, 0.1, 0.2, 0.4 and 0.8 s, and at the end
    assert all(re.match(r"long, \d+/1000 steps, 0\.\d s", line) for line in lines)


def test_stages_that_do_not_come_are_not_counted_and_others_are(capsys):
    with planned(["one", "two", "three", "four"]):
        for name in ("one", "three", "unforeseen", "four"):
            with stage(name):
                pass
    titles = [line.rpartition(",")[0] for line in lines_of(capsys)]
    assert titles == [
        "stage 1 of 4: one",
        "stage 2 of 3: three",
        "stage 3 of 4: unforeseen",
        "stage 4 of 4: four",
    ]


def test_an_outer_plan_holds(capsys):
    with planned(["one", "two"]), planned(["something else"]), stage("one"):
        pass
    assert lines_of(capsys)[0].startswith("stage 1 of 2: one")


def test_a_stage_within_a_stage_is_no_line_of_its_own(capsys):
    with stage("training", 2) as bar:
        for _ in bar.over(range(2)):
            with stage("evaluation", 1) as inner:
                inner.advance()
    assert [line.rpartition(",")[0] for line in lines_of(capsys)] == ["training, 2/2 steps"]


def work(name, items, seconds=0.02):
    with stage(name, items) as bar:
        for _ in bar.over(range(items)):
            time.sleep(seconds)


def test_the_rest_of_a_run_is_estimated_from_what_was_there_before_or_not_at_all():
    with planned(["a", "b", "a", "saving"]):
        with stage("a", 10) as bar:
            for _ in bar.over(range(10)):
                time.sleep(0.02)
            assert bar.run.left is None  # nobody knows how long b takes
        took = bar.elapsed
        with stage("b", 4) as bar:
            assert bar.left is None
            for number in bar.over(range(4)):
                time.sleep(0.05)
                if number == 2:
                    # two of four, and then one more without having said so
                    assert bar.left == pytest.approx(0.05, abs=0.06)
                    assert bar.run.left == pytest.approx(bar.left + took, abs=0.02)


def test_work_counts_where_items_differ():
    with stage("layers", 3, work=12.0) as bar:
        for amount in (1.0, 1.0):
            time.sleep(0.05)
            bar.advance(work=amount)
        assert 0.4 < bar.left < 2.0  # ten times what one took, not once


def test_what_an_interrupted_run_left_is_no_sign_of_speed():
    with planned(["refit", "other", "refit"]):
        with stage("refit", 10) as bar:
            for _ in range(8):
                bar.advance(measured=False)
            assert bar.left is None
            for _ in range(2):
                time.sleep(0.05)
                bar.advance()
        with stage("other", 2) as bar:
            bar.advance()
            bar.advance()
            assert bar.run.left is None  # the first was no whole one


def test_parts_of_one_kind_tell_how_long_others_take(capsys):
    kinds = ["obs", "obs", "taylor"]
    left = []
    with planned([]):
        for number, kind in enumerate(kinds[:2]):
            with part(f"point-{number}", ["a", "b"], number=number + 1, of=3, kind=kind, ahead=kinds[number + 1 : 2]):
                with stage("a", 2) as bar:
                    for _ in range(2):
                        time.sleep(0.02)
                        bar.advance()
                    left.append(bar.run.left)
                work("b", 2)
        with part("point-2", ["a", "b"], number=3, of=3, kind="taylor"), stage("a", 2) as bar:
            bar.advance()
            bar.advance()
            left.append(bar.run.left)
    assert (left[0], left[2]) == (None, None)
    assert left[1] == pytest.approx(0.04, abs=0.03)  # b
    assert lines_of(capsys)[2].startswith("point-1 (2 of 3), stage 1 of 2: a, 2/2 steps")


def test_a_part_that_failed_tells_nothing_of_others():
    with planned([]):
        with (
            part("failed", ["a", "b"], number=1, of=3, kind="obs", ahead=["obs", "obs"]),
            contextlib.suppress(ValueError),
        ):
            work("a", 2)
            with stage("b"):
                raise ValueError
        with part("next", ["a"], number=2, of=3, kind="obs", ahead=["obs"]), stage("a", 3) as bar:
            for _ in range(2):
                bar.advance()
            assert bar.left is not None
            assert bar.run.left is None


def test_threads_have_displays_of_their_own(capsys):
    def run(name):
        with planned([name, "more"]), stage(name):
            time.sleep(0.1)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line.rpartition(",")[0] for line in lines_of(capsys)) == ["stage 1 of 2: one", "stage 1 of 2: two"]


def test_reporting_costs_next_to_nothing(forks):
    """A step of the smallest of models takes a thousand times as long."""
    code = f"""{LOOP}
with stage("loop", 200_000) as bar:
    start = time.process_time()
    for number in range(200_000):
        bar.advance(loss=0.5, lr=0.1)
    print((time.process_time() - start) / 200_000)
"""
    status, output, _ = in_terminal(forks, "-c", code)
    assert status == 0
    assert float(output) < 20e-6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1:00"), (3599.7, "1:00:00"), (90061, "25:01:01")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.fixture(scope="module")
def pruned(forks, small_folder, images, tmp_path_factory):
    output = tmp_path_factory.mktemp("pruned") / "pruned"
    piped(
        forks,
        *PRUNE,
        small_folder,
        "--dataset",
        images,
        "--output",
        output,
        "--method",
        "magnitude",
        "--no-refit",
        *QUICK,
    )
    return output


@pytest.mark.slow
def test_benchmark_calibrate_and_export_have_stages(forks, pruned, tmp_path):
    command = ("-m", "hf_blockprune.cli")
    lines = piped(
        forks, *command, "benchmark", pruned, "--seconds", "0.5", "--batch-size", "1", "--batch-size", "2"
    ).stderr
    assert re.search(r"^benchmark, 1/1 s, ", lines, re.MULTILINE)
    lines = piped(forks, *command, "export", pruned, "--output", tmp_path / "dense", "--dense").stderr.splitlines()
    assert stages_of(lines) == ["loading", "exporting", "checking"]
    if "cpu" in available_backends():  # else there is nothing to measure
        lines = piped(
            forks, *command, "calibrate", "--output", tmp_path / "here.yaml", "--seconds", "1"
        ).stderr.splitlines()
        assert stages_of(lines) == ["preparation", "measurement", "fit"]


@pytest.mark.slow
def test_a_sweep_numbers_its_points(forks, small_folder, tmp_path):
    images = write_images(tmp_path / "images", 12)
    arguments = ["--budgets", "0.8,0.9", "--methods", "magnitude", "--dataset", images, "--evaluate", images]
    done = piped(
        forks,
        "-m",
        "hf_blockprune.cli",
        "sweep",
        small_folder,
        *arguments,
        "--output",
        tmp_path / "out",
        "--no-refit",
        "--block-shapes",
        "8x8",
    )
    lines = [line for line in done.stderr.splitlines() if "stage " in line]
    assert stages_of(lines[:2]) == ["loading", "evaluation"]
    for number, ratio in enumerate(("0.8", "0.9"), start=1):
        prefix = f"magnitude-8x8-flops-{ratio} ({number} of 2), "
        points = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
        assert stages_of(points) == ["loading", "saliency", "allocation", "evaluation", "saving"]
