"""Refinement against float64 NumPy, written from its formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import choose, encode, groups_of
from samples import correlated, output_error, statistics_of, weights

from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.affine import dequantize
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.refine import descend, refine, refit_scales
from jaxquant.numerics.scale_search import SHRINKS, SMALLEST, find_qparams
from jaxquant.numerics.spec import QuantSpec, int3, int4

K, N = 96, 12
SPECS = {
    "int4 group": int4(group_size=32),
    "int3 channel": int3(),
    "int2 asymmetric group": QuantSpec(bits=2, group_size=16, symmetric=False),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def given(spec, dtype=np.float64):
    w, stats = jnp.asarray(weights(K, N, dtype=dtype)), statistics_of(correlated(K, 3 * K, dtype=dtype))
    q, _ = RTN(spec).quantize(w)
    return w, stats.gram, q


def parts(q):
    zero = 0 if q.zero_point is None else np.asarray(q.zero_point, np.float64)
    rows, columns = groups_of(q.shape, q.spec.granularity, q.spec.group_size)
    return np.asarray(q.codes, np.float64), np.asarray(q.scale), np.broadcast_to(zero, q.scale.shape), rows, columns


@pytest.mark.usefixtures("float64")
@every_spec
def test_refitted_scales_are_the_least_squares_solution(spec):
    w, gram, q = given(spec)
    found = refit_scales(w, gram, q.codes, (q.scale, q.zero_point))
    codes, _, zero, rows, columns = parts(q)
    root = np.linalg.cholesky(np.asarray(gram) + 1e-9 * np.eye(K)).T  # ‖root Δ‖² is the error
    for n in range(N):
        steps = codes[:, n] - zero[rows[:, n], columns[:, n]]
        basis = np.stack([np.where(rows[:, n] == g, steps, 0) for g in range(len(found))], 1)
        best, *_ = np.linalg.lstsq(root @ basis, root @ np.asarray(w[:, n]), rcond=None)
        old = np.asarray(q.scale[:, n])
        way = min([1.0, *(-0.9 * old / (best - old))[best < old]])  # no scale loses more than nine tenths
        np.testing.assert_allclose(found[:, n], old + way * (best - old), rtol=1e-4)  # up to the ridge


@pytest.mark.usefixtures("float64")
@every_spec
def test_descent_moves_each_code_to_the_minimum(spec):
    w, gram, q = given(spec)
    found = descend(w, gram, q.codes, (q.scale, q.zero_point), spec)
    codes, scale, zero, rows, columns = parts(q)
    h, s, z = np.asarray(gram), scale[rows, columns], zero[rows, columns]
    low, high = spec.min_code, spec.max_code
    for k in range(K):  # every code of a row, by trying all of them
        tried = []
        for code in range(low, high + 1):
            codes[k] = code
            delta = (codes - z) * s - np.asarray(w)
            tried.append(np.sum(delta * (h @ delta), 0))
        codes[k] = low + np.argmin(tried, 0)
    np.testing.assert_array_equal(found, codes)


@pytest.mark.usefixtures("float64")
@every_spec
def test_every_round_brings_every_column_closer(spec):
    w, gram, q = given(spec)

    def errors(codes, scale):
        delta = np.asarray(dequantize(QTensor.from_codes(codes, scale, q.zero_point, spec, dtype=np.float64)) - w)
        return np.sum(delta * (np.asarray(gram) @ delta), 0)

    before = errors(q.codes, q.scale)
    for rounds in (1, 2, 4):
        codes, (scale, _) = refine(w, gram, q.codes, (q.scale, q.zero_point), spec, rounds)
        after = errors(codes, scale)
        assert np.all(after <= before * (1 + 1e-12))
        before = after
    assert np.sum(before) < 0.5 * np.sum(errors(q.codes, q.scale))


def test_inputs_that_are_always_zero_keep_their_codes():
    w, _, q = given(int4(group_size=32), np.float32)
    x = correlated(K, 3 * K)
    x[:, 32:64] = 0  # a whole group
    x[:, 5] = 0
    codes, (scale, _) = refine(w, statistics_of(x).gram, q.codes, (q.scale, None), int4(group_size=32), 2)
    np.testing.assert_array_equal(codes[32:64], q.codes[32:64])
    np.testing.assert_array_equal(codes[5], q.codes[5])
    assert np.all(np.isfinite(scale))
    assert np.all(scale > 0)


@pytest.mark.parametrize("clip", ["mse", "diagonal", "output"])
@pytest.mark.usefixtures("float64")
@every_spec
def test_clipped_ranges_are_the_best_of_those_tried(spec, clip):
    w, gram, _ = given(spec)
    scale, zero = find_qparams(w, spec, clip, gram)
    rows, _ = groups_of((K, N), spec.granularity, spec.group_size)
    h = {"mse": np.eye(K), "diagonal": np.diag(np.diag(gram)), "output": np.asarray(gram)}[clip]
    for g, n in np.ndindex(scale.shape):
        here = np.flatnonzero(rows[:, n] == g)
        x, own = np.asarray(w[here, n]), h[np.ix_(here, here)]
        tried = []
        for i in range(SHRINKS):
            s, z = choose(x * (1 - i * ((1 - SMALLEST) / SHRINKS)), spec.bits, spec.symmetric)
            delta = (encode(x, s, z, spec.bits) - z) * s - x
            tried.append((delta @ own @ delta, s, z))
        _, s, z = min(tried, key=lambda t: t[0])
        np.testing.assert_allclose(scale[g, n], s, rtol=1e-12)
        assert spec.symmetric or zero[g, n] == z


@functools.partial(jax.jit, static_argnums=2)
def run(w, stats, config):
    return config.quantize(w, stats)


@pytest.mark.parametrize("act_order", [True, False])
@every_spec
def test_gptq_gets_better_with_each_option(spec, act_order):
    w, stats = jnp.asarray(weights(K, N)), statistics_of(correlated(K, 3 * K))
    errors = [
        output_error(w, run(w, stats, GPTQ(spec, act_order=act_order, **options))[0], stats.gram)
        for options in ({}, {"clip": "diagonal"}, {"clip": "diagonal", "refine": 2})
    ]
    assert errors[2] < errors[1] < errors[0]


def test_a_program_does_not_grow_with_the_matrix():
    def lines(k):
        w, stats = jnp.zeros((k, 16)), statistics_of(np.zeros((1, k), np.float32))
        return len(run.lower(w, stats, GPTQ(int4(group_size=64), clip="output", refine=3)).as_text().splitlines())

    assert lines(512) == lines(2048) < 2000
