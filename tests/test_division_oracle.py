"""Codes against the textbook's true divisions: equal wherever the quotient is no tie."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from samples import weights

from jaxquant.numerics.affine import quantize
from jaxquant.numerics.spec import QuantSpec

GROUP_SIZES = {"per_tensor": None, "per_channel": None, "per_group": 8}
TIE = {"float64": 1e-9, "float32": 1e-4}  # of quotients up to 128, whose last bit is 3e-14 and 2e-5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dtype", TIE)
@pytest.mark.parametrize("narrow_range", [False, True])
@pytest.mark.parametrize("granularity", GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_those_of_true_division_but_for_ties(symmetric, granularity, narrow_range, dtype):
    for bits in (2, 3, 4, 8):
        group_size, tie = GROUP_SIZES[granularity], TIE[dtype]
        x = weights(48, 16, seed=bits, dtype=dtype) + np.asarray(0.3, dtype)
        codes, scale, zero, margin, zero_margin = oracles.by_division(
            x, bits, symmetric, granularity, group_size, narrow_range
        )
        q = quantize(jnp.asarray(x), QuantSpec(bits, group_size, symmetric, granularity, narrow_range))
        np.testing.assert_allclose(q.scale, scale, rtol=4 * np.finfo(dtype).eps)
        if not symmetric:
            assert zero_margin.min() > tie
            np.testing.assert_array_equal(q.zero_point, zero)
        difference = np.abs(np.asarray(q.codes, int) - codes)
        assert np.max(difference) <= 1
        np.testing.assert_array_equal(difference[margin > tie], 0)
        # the extreme of a range that is symmetric and full is a tie, and next to nothing else is
        extremes = scale.size if symmetric and not narrow_range else 0
        assert extremes <= np.sum(margin <= tie) <= extremes + 2
