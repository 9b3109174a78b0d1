"""Running moments of a product's inputs, and the factorization of their Gram matrix."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics import statistics
from jaxquant.numerics.linalg import damped_udu

T, K = 400, 6
EVERY = statistics.HELD_OUT_EVERY
FIELDS = "gram", "absmax", "mean_abs", "count", "held_out"


def rows(seed=0, tokens=T, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(tokens, K)).astype(dtype)


def held_out(position):
    return np.asarray(statistics.token_hash(jnp.asarray(position))) % EVERY == 0


def assert_same(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), a, b)


def test_the_moments_are_those_of_the_rows_that_are_not_held_out():
    x, position = rows(), np.arange(T)
    used = x[~held_out(position)].astype(np.float64)
    stats = statistics.finish(statistics.observe(jnp.asarray(x), jnp.asarray(position)))
    np.testing.assert_allclose(stats.gram, used.T @ used / len(used), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.mean_abs, np.abs(used).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(stats.absmax, np.abs(x).max(0))  # a range is of all rows
    assert (stats.count, stats.dropped) == (len(used), 0)


def test_held_out_rows_are_a_sample_of_one_batch_and_in_no_mean():
    x, position = rows(), np.arange(T)
    sample = x[held_out(position)]
    assert 0.3 / EVERY < len(sample) / T < 3 / EVERY
    stats = statistics.finish(statistics.observe(jnp.asarray(x), jnp.asarray(position)))
    kept = stats.held_out[np.any(stats.held_out != 0, -1)]
    assert stats.held_out.shape == (statistics.SAMPLE_ROWS, K)
    assert {tuple(r) for r in kept.tolist()} == {tuple(r) for r in sample.tolist()}
    huge = np.where(held_out(position)[:, None], 1e6, x)
    other = statistics.finish(statistics.observe(jnp.asarray(huge), jnp.asarray(position)))
    assert_same((stats.gram, stats.mean_abs), (other.gram, other.mean_abs))


def test_the_sample_is_bounded_and_depends_on_positions_only():
    tokens = 40 * statistics.SAMPLE_ROWS
    x, position = rows(tokens=tokens), np.arange(tokens)
    whole = statistics.observe(jnp.asarray(x), jnp.asarray(position))
    assert whole.rows.shape == (statistics.SAMPLE_ROWS, K)
    assert np.all(np.diff(np.asarray(whole.rank, np.int64)) > 0)
    assert np.all(whole.rank != statistics.EMPTY)
    order = np.random.default_rng(1).permutation(tokens)
    shuffled = statistics.observe(jnp.asarray(x[order]), jnp.asarray(position[order]))
    np.testing.assert_array_equal(whole.rows, shuffled.rows)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_batches_merge_in_any_order(order):
    x, position = rows(), np.arange(T)
    x[7] = np.inf
    whole = statistics.observe(jnp.asarray(x), jnp.asarray(position))
    parts = [slice(0, 50), slice(50, 51), slice(51, T)]
    moments = [statistics.observe(jnp.asarray(x[parts[i]]), jnp.asarray(position[parts[i]])) for i in order]
    merged = functools.reduce(statistics.merge, moments, statistics.empty_like(whole))
    assert_same(merged, whole)
    np.testing.assert_array_equal(merged.rows, whole.rows)


def test_rows_that_are_not_finite_are_dropped_and_counted():
    x, position = rows(), np.arange(T)
    bad = x.copy()
    bad[3, 2], bad[100, 0], bad[101] = np.nan, np.inf, -np.inf
    at = [3, 100, 101]
    stats = statistics.finish(statistics.observe(jnp.asarray(bad), jnp.asarray(position)))
    good = np.delete(x, at, 0), np.delete(position, at)
    expected = statistics.finish(statistics.observe(*map(jnp.asarray, good)))
    assert stats.dropped == 3
    assert expected.dropped == 0
    assert_same([getattr(stats, f) for f in FIELDS], [getattr(expected, f) for f in FIELDS])


def test_padding_is_left_out_and_not_counted_as_dropped():
    x, position = rows(), np.arange(T)
    real = np.arange(T) % 5 != 0
    padded = np.where(real[:, None], x, np.nan)
    stats = statistics.finish(statistics.observe(jnp.asarray(padded), jnp.asarray(position), jnp.asarray(real)))
    expected = statistics.finish(statistics.observe(jnp.asarray(x[real]), jnp.asarray(position[real])))
    assert stats.dropped == 0
    assert_same([getattr(stats, f) for f in FIELDS], [getattr(expected, f) for f in FIELDS])


def test_no_rows_at_all():
    stats = statistics.finish(statistics.observe(jnp.zeros((0, K)), jnp.zeros((0,), jnp.int32)))
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(stats, field), 0)


def test_rows_of_several_groups_are_observed_at_once():
    x, position, sizes = rows(), np.arange(T), np.array([150, 0, 200])
    x[20] = np.nan
    together = statistics.observe_groups(jnp.asarray(x), jnp.asarray(position), jnp.asarray(sizes, jnp.int32))
    ends = np.cumsum(sizes)
    for i, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        part = slice(end - size, end)
        alone = statistics.observe(jnp.asarray(x[part]), jnp.asarray(position[part]))
        assert_same(jax.tree.map(lambda a, i=i: a[i], together), alone)


def test_half_precision_inputs_are_summed_in_float32():
    x = jnp.ones((4096, 2), jnp.bfloat16)
    stats = statistics.finish(statistics.observe(x, jnp.arange(4096)))
    assert stats.gram.dtype == jnp.float32
    np.testing.assert_allclose(stats.gram, 1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("k", [1, 7, 60])
def test_the_factor_equals_that_of_the_inverse(k):
    """U D Uᵀ = h + damping · mean · I, and the paper's C with H⁻¹ = CᵀC is D^-½ U⁻¹."""
    x = np.random.default_rng(k).normal(size=(3 * k, k))
    h = x.T @ x / (3 * k)
    factor = jax.jit(damped_udu, static_argnums=1)(jnp.asarray(h), 0.05)
    upper, damped = np.asarray(factor.upper), h + 0.05 * np.diag(h).mean() * np.eye(k)
    np.testing.assert_array_equal(np.tril(upper, -1), 0)
    np.testing.assert_allclose(np.diag(upper), 1, rtol=1e-15)
    d = np.linalg.solve(upper, np.linalg.solve(upper, damped).T)
    np.testing.assert_allclose(d, np.diag(np.diag(d)), atol=1e-12)
    c = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(np.linalg.inv(upper) / np.sqrt(np.diag(d))[:, None], c, atol=1e-12)
    assert (factor.damping, factor.retries) == (0.05, 0)


@pytest.mark.parametrize("scale", [1e-20, 1, 1e20])
@pytest.mark.parametrize("percdamp", [0.0, 1e-9])
def test_singular_matrices_are_damped_until_they_factor(percdamp, scale):
    x = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    factor = damped_udu(jnp.asarray(x.T @ x * np.float32(scale)), percdamp)
    assert np.all(np.isfinite(factor.upper))
    assert factor.retries > 0
    assert percdamp < factor.damping < 1e-3


def test_an_indefinite_matrix_takes_as_much_damping_as_it_needs():
    h = jnp.asarray([[1.0, 3.0], [3.0, 1.0]])  # eigenvalues -2 and 4
    factor = damped_udu(h, 0.01)
    assert factor.damping == pytest.approx(10)
    np.testing.assert_allclose(factor.upper, [[1, 3 / 11], [0, 1]], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_couples_nothing(bad):
    factor = damped_udu(jnp.eye(5).at[4, 4].set(bad), 0.01)
    np.testing.assert_array_equal(factor.upper, np.eye(5))
    assert factor.damping == np.inf


def test_one_failure_in_a_stack_does_not_touch_the_others():
    x = np.random.default_rng(0).normal(size=(3, 80, 20)).astype(np.float32)
    x[1, :, 3] = x[1, :, 4]
    h = jnp.asarray(np.swapaxes(x, 1, 2) @ x)
    stack = jax.vmap(lambda h: damped_udu(h, 0.0))(h)
    np.testing.assert_array_equal(stack.retries > 0, [False, True, False])
    for i in range(3):
        assert_same(jax.tree.map(lambda a, i=i: a[i], stack), damped_udu(h[i], 0.0))
