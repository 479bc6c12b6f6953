"""Scripts that say what the package looks like, and in what two results of it differ."""

import json

import pytest
import torch
from safetensors.torch import save_file

from scripts import compare_folders, draw_rooms, rooms
from tests.conftest import ROOT
from tests.forking import plain_forks


def differences(one, other):
    return [*compare_folders.differing_tensors(one, other), *compare_folders.differing_values(one, other)]


def write_model(folder, *, weight=1.0, dtype=torch.bfloat16, **report):
    folder.mkdir()
    save_file({"a.weight": torch.full((2, 2), weight, dtype=dtype)}, folder / "model.safetensors")
    values = {"density": 0.5, "layers": [{"name": "a", "kept": 3}], "seconds": {"saliency": 1.0}, **report}
    (folder / "blockprune_report.json").write_text(json.dumps(values))
    return folder


def test_folders_that_differ_in_times_alone_are_the_same(tmp_path):
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other", seconds={"saliency": 9.0})
    assert differences(one, other) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"weight": 1.25}, "a.weight: 4 of 4 values differ, by at most 0.25"),
        ({"weight": -0.0}, "a.weight: 4 of 4 values differ, by at most 1"),
        ({"dtype": torch.float32}, "a.weight: torch.bfloat16 [2, 2], then torch.float32 [2, 2]"),
        ({"density": 0.25}, "blockprune_report.json: density: 0.5, then 0.25"),
        ({"layers": [{"name": "a", "kept": 4}]}, "blockprune_report.json: layers[0]: kept: 3, then 4"),
        ({"calibration": None}, "blockprune_report.json: calibration is in one of them alone"),
    ],
)
def test_every_difference_is_named(tmp_path, changes, line):
    assert differences(write_model(tmp_path / "one"), write_model(tmp_path / "other", **changes)) == [line]


@pytest.mark.parametrize(("other", "code"), [("same", 0), ("changed", 1), ("empty", 2)])
def test_the_exit_status_tells(tmp_path, other, code):
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "one"), write_model(tmp_path / "same"), write_model(tmp_path / "changed", weight=2)
    done = plain_forks().run(ROOT / "scripts/compare_folders.py", tmp_path / "one", tmp_path / other)
    said = ["the same weights", "4 of 4 values differ", "no folder with a model"][code]
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True)


def test_rooms_come_after_those_that_they_import():
    arrows = {"pruner": {"data", "hub"}, "data": {"errors"}, "errors": {"hub"}, "hub": set()}
    assert rooms.levels(arrows) == [["hub"], ["errors"], ["data"], ["pruner"]]
    assert rooms.circle(arrows) == []


def test_a_circle_is_named():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}
    (said,) = rooms.circle(arrows)
    assert said.startswith("rooms import each other: ")
    assert set(said.removeprefix("rooms import each other: ").split(" -> ")) == {"a", "b", "c"}


def test_the_package_has_no_circle():
    arrows = {}
    for path in rooms.ROOT.rglob("*.py"):
        if path != rooms.ROOT / "__init__.py":
            room = rooms.room_of(path)
            arrows.setdefault(room, set()).update(rooms.imported_rooms(path) - {room})
    assert arrows["errors"] == {"hub"}
    assert "pruner" in arrows["cli"] or "jobs" in arrows["cli"]
    assert rooms.circle(arrows) == []


def test_the_picture_of_rooms_is_that_of_the_imports():
    assert draw_rooms.PICTURE.read_text(encoding="utf-8") == draw_rooms.picture(), "run python scripts/draw_rooms.py"


def test_arrows_that_others_imply_are_not_drawn():
    arrows = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a", "c"}}
    assert draw_rooms.direct(arrows) == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"c"}}
