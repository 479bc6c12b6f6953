"""Non-negative least squares against scipy-free brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_blockprune.measure.fit import fit_times


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(5, 12), st.integers(0, 1 << 30))
def test_no_other_coefficients_come_closer(count, measurements, seed):
    random = np.random.default_rng(seed)
    terms, times = random.random((measurements, count)), random.random(measurements) + 0.1
    found = fit_times(terms, times)
    assert (found >= 0).all()

    def error(values):
        return float(((terms @ values / times - 1) ** 2).sum())

    # The problem is convex: where no small step helps, nothing does.
    for step in random.normal(size=(200, count)) * 1e-3:
        assert error(np.maximum(found + step, 0)) >= error(found) - 1e-12


def test_what_made_the_times_is_found():
    random = np.random.default_rng(0)
    terms, truth = random.random((30, 4)), np.array([2.0, 0.0, 0.5, 1.0])
    np.testing.assert_allclose(fit_times(terms, terms @ truth), truth, atol=1e-9)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="positive"):
        fit_times(np.ones((2, 1)), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="too many"):
        fit_times(np.ones((2, 13)), np.ones(2))
