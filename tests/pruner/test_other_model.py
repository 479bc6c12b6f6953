"""Whatever another model is wanted for, it is read in one way, and what does not fit is refused in the same words."""

import numpy as np
import pytest

from hf_blockprune import BlockPruneConfig, BlockPruner, ModelError
from hf_blockprune.evaluate.accuracy import Predictions
from hf_blockprune.evaluate.fidelity import Embeddings
from hf_blockprune.pruner.other_model import TEACHER, find_other
from tests.conftest import tiny_model

PREDICTIONS = Predictions(np.arange(1), np.zeros(1), np.zeros((1, 1)), [])
EMBEDDINGS = Embeddings(np.arange(1), np.zeros((1, 4)), [])
CONFIG = BlockPruneConfig(method="magnitude", block_shape=(16, 16), budget={"metric": "flops", "ratio": 0.75})


@pytest.fixture
def pruner(processor):
    pruner = BlockPruner(tiny_model(), processor, CONFIG, name="tiny")
    pruner.prune()
    return pruner


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.evaluate("nowhere", against=EMBEDDINGS), "cannot be compared with Embeddings"),
        (lambda p: p.evaluate("nowhere", against=7), "cannot be compared with int"),
        (lambda p: p.benchmark(against=PREDICTIONS), "cannot be compared with Predictions"),
        (lambda p: p.benchmark(against=p.model), "cannot be compared with ViTForImageClassification"),
        (lambda p: p.recover("nowhere", teacher=PREDICTIONS), "cannot learn from Predictions"),
        (lambda p: p.finetune("nowhere", teacher=7), "cannot learn from int"),
    ],
)
def test_what_is_no_other_model_is_refused_before_the_work(pruner, ask, message):
    with pytest.raises(ModelError, match=f"^tiny {message}; name the dense model it was pruned from"):
        ask(pruner)


def test_a_teacher_that_is_missing_is_asked_for_in_the_same_words(pruner):
    with pytest.raises(ModelError, match=r"^tiny: name the dense model it was pruned from as teacher$"):
        pruner.recover("nowhere")


def test_another_model_is_loaded_when_it_is_asked_for(pruner, vit_folder, tmp_path):
    assert find_other(pruner, None) is None
    missing = find_other(pruner, tmp_path / "nowhere", TEACHER)
    with pytest.raises(ModelError, match="nowhere"):
        _ = missing.pruner
    dense = find_other(pruner, str(vit_folder))
    assert dense.is_dense
    assert dense.named == {"against": vit_folder.name}
    assert dense.pruner.accelerator is pruner.accelerator


def test_pruned_models_and_answers_have_no_name_in_reports(pruner):
    other, answers = find_other(pruner, pruner), find_other(pruner, PREDICTIONS, answers=(Predictions,))
    assert (other.is_dense, other.named, other.pruner) == (False, {}, pruner)
    assert (answers.is_dense, answers.named, answers.answers) == (True, {}, PREDICTIONS)
