"""What several tests of the files that travel with checkpoints begin with."""

import pytest
from transformers import AutoModelForImageClassification

from hf_blockprune.hub import blockprune_ops as ops
from hf_blockprune.hub import blockprune_quick_halves
from tests.conftest import tiny_model
from tests.hub.saved_models import pruned


@pytest.fixture(scope="module")
def first(tmp_path_factory, processor):
    """(folder, model) of a checkpoint that the pruner saved."""
    folder = tmp_path_factory.mktemp("first") / "saved"
    pruner = pruned(tiny_model(), processor)
    pruner.save_pretrained(folder)
    return folder, pruner.model


@pytest.fixture
def loaded(first):
    return AutoModelForImageClassification.from_pretrained(first[0])


@pytest.fixture
def by_parts(monkeypatch):
    """No halves of layers in one call, so that their parts can be seen."""
    monkeypatch.setattr(blockprune_quick_halves, "_RUNNERS", {})


@pytest.fixture
def applied(monkeypatch, by_parts):
    """The activation that the op applied in each call."""
    seen = []
    run, run_quickly = ops.run, ops.run_quickly

    def quickly(x, layers):
        outputs = run_quickly(x, layers)
        seen.extend(layer.activation for layer in layers if outputs is not None)  # else it goes the ordinary way
        return outputs

    monkeypatch.setattr(ops, "run", lambda x, layer, backend: seen.append(layer.activation) or run(x, layer, backend))
    monkeypatch.setattr(ops, "run_quickly", quickly)
    return seen
