"""Which features of a layer stay, and how its Linears and attention are then."""

import torch

from hf_blockprune.model.shrunk import LayerShape
from hf_blockprune.model.structure import TransformerLayer

LAYER = TransformerLayer("a.query", "a.key", "a.value", "a.out", "m.fc1", "m.fc2", heads=3)


def shape_of(heads=(0, 1, 2), size=4, units=tuple(range(6))):
    return LayerShape(LAYER, heads, size, 4, units, 6)


def test_the_whole_layer_keeps_everything():
    shape = shape_of()
    assert not shape.kept()
    assert shape.cut_heads() is None
    assert len(shape.gone_features()) == len(shape.gone_units()) == 0


def test_first_features_of_some_heads():
    shape = shape_of(heads=(0, 2), size=3)
    assert shape.features().tolist() == [0, 1, 2, 8, 9, 10]
    assert shape.gone_features().tolist() == [3, 4, 5, 6, 7, 11]
    kept = shape.kept()
    assert set(kept) == {"a.query", "a.key", "a.value", "a.out"}
    for name in ("a.query", "a.key", "a.value"):
        outputs, inputs = kept[name]
        assert torch.equal(outputs, shape.features())
        assert inputs is None
    assert kept["a.out"][0] is None
    assert torch.equal(kept["a.out"][1], shape.features())
    cut = shape.cut_heads()
    assert (cut.heads, cut.head_size, cut.dense_heads, cut.dense_head_size) == (2, 3, 3, 4)


def test_units_leave_both_sides():
    kept = shape_of(units=(0, 3, 5)).kept()
    assert set(kept) == {"m.fc1", "m.fc2"}
    assert kept["m.fc1"][0].tolist() == kept["m.fc2"][1].tolist() == [0, 3, 5]
    assert kept["m.fc1"][1] is kept["m.fc2"][0] is None
