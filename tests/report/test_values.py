"""The report as typed parts: what is read is written again, and what is none is refused by its key."""

import json

import pytest

from hf_blockprune import CheckpointError
from hf_blockprune.report.measured import MeasuredScores
from hf_blockprune.report.values import LayerReport, Report

LAYER = {"name": "fc1", "shape": [8, 4], "block_shape": [4, 4], "kept_blocks": 1, "blocks": 2, "density": 0.5}
LEAST = {"base_model": "m", "config": {}, "layers": [LAYER], "seconds": {"refit": 1}}


def test_what_is_read_is_written_again():
    evaluation = {"dataset": "x", "split": None, "top1": 0.5, "num_images": 4}
    values = {
        **LEAST,
        "permutation": {"residual_order": [1, 0]},
        "calibration": None,
        "recovery": {"num_images": 3, "evaluation_before": evaluation},
        "evaluation": evaluation,
        "history": {"latency": [{"rows": [{"batch": 1, "speedup": 2}]}]},
        "size_bytes": None,
    }
    report = Report.from_dict(values)
    assert report.to_dict() == values
    assert json.loads(json.dumps(report.to_dict())) == values
    assert report.measured.evaluation == MeasuredScores.from_dict(evaluation)
    assert report.masks.layers[0].cut_units == 0


def test_older_files_get_no_keys_but_those_that_readers_count_on():
    missing = dict.fromkeys(("permutation", "calibration", "recovery", "evaluation"))
    report = Report.from_dict(LEAST)
    assert report.to_dict() == {**LEAST, **missing}
    report.size_bytes = 7
    report.masks.layers[0].cut_units = 2
    assert report.to_dict() == {**LEAST, **missing, "size_bytes": 7, "layers": [{**LAYER, "cut_units": 2}]}


def test_keys_of_newer_versions_stay():
    values = Report.from_dict({**LEAST, "novelty": [1], "layers": [{**LAYER, "more": {"a": 1}}]}).to_dict()
    assert values["novelty"] == [1]
    assert values["layers"][0]["more"] == {"a": 1}


def test_a_made_report_is_that_of_its_file():
    made = LayerReport(**LAYER)
    assert LayerReport.from_dict(made.to_dict()).to_dict() == made.to_dict()


def test_plain_values_are_copies():
    report = Report.from_dict(LEAST)
    report.to_dict()["seconds"]["refit"] = 5
    report.to_dict()["layers"][0]["blocks"] = 5
    assert report.to_dict()["seconds"] == {"refit": 1}
    assert report.masks.layers[0].blocks == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model": 1}, "file.json: base_model must be text, got 1; delete the file"),
        ({"layers": [{}]}, r"layers\[0\].name must be there, and be text"),
        ({"layers": [{**LAYER, "blocks": True}]}, r"layers\[0\].blocks must be a whole number, got True"),
        ({"layers": [{**LAYER, "shape": [8, "4"]}]}, r"layers\[0\].shape\[1\] must be a whole number"),
        ({"seconds": {"refit": "long"}}, "seconds.refit must be a number"),
        ({"encoder": "no"}, "encoder must be true or false"),
        ({"evaluation": {"top1": "good"}}, "evaluation.top1 must be a number, got good"),
        ({"history": {"latency": [{"rows": [7]}]}}, r"history.latency\[0\].rows\[0\] must be an object"),
        ({"format_version": 2}, "format_version: this code reads 1, got 2; a newer hf_blockprune may read it"),
    ],
)
def test_other_kinds_are_refused_by_their_key(changes, message):
    with pytest.raises(CheckpointError, match=message):
        Report.from_dict({**LEAST, **changes}, "file.json")


@pytest.mark.parametrize("values", [None, [], "report"])
def test_what_is_no_object_is_refused(values):
    with pytest.raises(CheckpointError, match="must be an object"):
        Report.from_dict(values, "file.json")
