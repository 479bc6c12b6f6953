"""No damaged or forged checkpoint does more than raise an error that says what is wrong with it."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_blockprune import ModelError
from hf_blockprune.checkpoint.inspection import inspect_checkpoint
from tests.fuzzing import FIXTURES, Damage, check, damages, forge


@pytest.mark.parametrize("fixture", range(len(FIXTURES)))
def test_the_fixture_itself_loads(fixture, tmp_path):
    forge(tmp_path / "forged", [], fixture)
    assert check(tmp_path / "forged") == "loaded"


@pytest.mark.slow
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(damages, min_size=1, max_size=2), fixture=st.sampled_from(range(len(FIXTURES))))
def test_only_typed_errors_and_true_models_come_of_damage(tmp_path, changes, fixture):
    forge(tmp_path / "forged", changes, fixture)
    check(tmp_path / "forged")


@pytest.mark.parametrize("place", ["num_hidden_layers", "hidden_size", "image_size", "intermediate_size"])
@pytest.mark.parametrize("value", [10**6, 2**62, 2**70])
def test_sizes_beyond_what_the_files_hold_are_refused_before_anything_is_built(tmp_path, place, value):
    forge(tmp_path / "forged", [Damage("config", (place,), value)])
    with pytest.raises(ModelError, match=place):
        inspect_checkpoint(tmp_path / "forged")
