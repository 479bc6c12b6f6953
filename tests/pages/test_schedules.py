"""What a page says of tokens that merge: the checkpoint's schedule, and those that were tried."""

import json

import pytest

from hf_blockprune import BlockPruneConfig, BlockPruner, CheckpointError
from hf_blockprune.pages.description import describe
from hf_blockprune.pages.page import report_page
from tests.page_reader import Page

REPORT = "blockprune_report.json"
FRONTIER = [([0, 0], 1.0, 0.0), ([3, 0], 0.9, 0.02), ([4, 2], 0.8, 0.11)]
TRIALS = [([3, 0], 0.9, 0.07), ([4, 2], 0.8, 0.08), ([4, 2], 0.8, 0.05)]
TABLE = "Schedules that were tried with the other moves, on images that nothing was fitted to"


def tried(rows):
    return [{"leave": leave, "share": share, "divergence": divergence} for leave, share, divergence in rows]


@pytest.fixture(scope="module")
def saved(vit_folder, tmp_path_factory):
    """Two checkpoints: one whose tokens merge, and one of the same weights whose tokens do not."""
    folder = tmp_path_factory.mktemp("merging")
    for tokens in ((4, 2), "keep"):
        budget = {"metric": "flops", "ratio": 0.7}
        pruner = BlockPruner.from_pretrained(
            vit_folder, BlockPruneConfig(method="magnitude", tokens=tokens, budget=budget)
        )
        pruner.prune()
        pruner.save_pretrained(folder / ("keep" if tokens == "keep" else "merging"))
    return folder


@pytest.fixture
def checkpoint(saved):
    """The one whose tokens merge, as if others had been tried; a function changes what its report file says of it."""
    file = saved / "merging" / REPORT
    before = file.read_text()

    def say(**changes):
        values = json.loads(before)
        values["tokens"] |= {"frontier": tried(FRONTIER), "trials": tried(TRIALS), **changes}
        file.write_text(json.dumps(values))
        return saved / "merging"

    yield say
    file.write_text(before)


def test_what_was_tried_is_drawn_and_told(checkpoint):
    report = describe(checkpoint())
    page = Page(report_page([report]))
    assert "Of 16 patches of an image 10 are left after the last layer; layer by layer: 12, 10." in page.words
    assert [row[:4] for row in page.tables[TABLE][1:]] == [
        ["1", "13", "90.0 %", "0.07"],
        ["2", "10", "80.0 %", "0.08"],
        ["3", "10", "80.0 %", "0.05"],
    ]
    assert [row[4] for row in page.tables[TABLE][1:]] == ["", "", "taken"]
    circles = page.with_tag("circle")
    assert [circle["class"] for circle in circles] == ["best"] * 3 + ["other"] * 2 + ["dense"]
    x, y = ([float(circle[axis].rstrip("%")) for circle in circles] for axis in ("cx", "cy"))
    assert x[0] > x[1] > x[2]
    assert (x[1], x[2], x[2]) == (x[3], x[4], x[5])
    assert sorted(range(6), key=lambda i: -y[i]) == [0, 1, 5, 3, 4, 2]  # less divergence is further down
    assert not [line for line in page.with_tag("line") if line["class"] == "whisker"]


def test_numbers_that_somebody_named_were_not_compared_with_others(checkpoint):
    page = Page(report_page([describe(checkpoint(frontier=[], trials=[]))]))
    assert "10 are left after the last layer" in page.words
    assert TABLE not in page.tables
    assert page.with_tag("circle") == []


def test_a_model_in_which_none_merge_says_nothing_of_them(saved):
    report = describe(saved / "keep")
    assert report.values["tokens"] is None
    assert "okens that merge" not in report_page([report])


def test_a_report_file_that_speaks_of_other_tokens_is_pointed_out(checkpoint, saved):
    for changes in ({"leave": [4, 3]}, {"patches": 20}):
        report = describe(checkpoint(**changes))
        assert [note for note in report.values["notes"] if "other tokens that merge" in note]
        assert report.values["tokens"]["remaining"] == [12, 10]
        assert report.values["tokens"]["trials"] == []
    file = saved / "keep" / REPORT
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "tokens": {"leave": [4, 2], "patches": 16}}))
    assert [note for note in describe(saved / "keep").values["notes"] if "the config of none" in note]
    file.write_text(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": "all"}, "tokens.trials: expected a list"),
        ({"leave": [1]}, "tokens.leave: expected 2 numbers"),
        ({"trials": [{"share": 0.8, "divergence": 1}]}, r"trials\[0\].leave: expected 2 numbers, got nothing"),
        (
            {"trials": [{"leave": [4, 2], "share": 0.8}]},
            r"tokens.trials\[0\].divergence: expected a number, got nothing",
        ),
        (
            {"frontier": [{"leave": [4, 2], "share": -1, "divergence": 0}]},
            r"frontier\[0\].share: expected a number from 0",
        ),
        ({"frontier": [{"leave": ["x", 2], "share": 1, "divergence": 0}]}, r"frontier\[0\].leave: expected 2 numbers"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(checkpoint, changes, message):
    with pytest.raises(CheckpointError, match=message):
        describe(checkpoint(**changes))


def test_the_card_says_that_tokens_merge(saved):
    words = " ".join((saved / "merging/README.md").read_text().split())
    assert "patches of an image after the last layer | 16 | 10 |" in words
    assert "4, 2 of 16 leave, layer by layer" in words
    assert "okens of patches" not in (saved / "keep/README.md").read_text()
