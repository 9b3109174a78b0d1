"""Calibration against statistics recomputed, one product at a time, from plain code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import axes_of, check, lead_shape, oracle
from functions import CASES, normal
from jax import lax
from streams import check_mlp, mlp, mlp_params, stream

from jaxquant.methods.rtn import RTN
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import int4
from jaxquant.numerics.statistics import HELD_OUT_EVERY, SAMPLE_ROWS, token_hash
from jaxquant.transforms.calibrate import calibrate
from jaxquant.transforms.quantize import quantize_params
from jaxquant.transforms.tracing.interpreter import named_leaves


@functools.cache
def calibrated(name):
    case = CASES[name]
    return calibrate(case.apply, case.params(), case.batches())


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_the_products_inputs(name):
    case, stats = CASES[name], calibrated(name)
    params = case.params()
    want, axes = oracle(case.batches(), case.reference, params), axes_of(case, params)
    assert set(stats.products) == set(want)
    assert stats.lookups == case.lookups
    assert {path for path, _ in stats.notes} == case.noted
    for path, leads in want.items():
        product, (shape, contract, out) = stats.products[path], axes[path]
        assert (product.contract, product.out) == (contract, out), path
        check(product.inputs, leads, lead_shape(shape, contract, out), int(np.prod([shape[a] for a in contract])))
    for group in case.shared:
        assert len({id(stats.products[p].inputs) for p in group}) == 1
    check_layout(params, stats, axes)


def check_layout(params, stats, axes):
    """`quantize_params` lays the weights out by the axes that calibration has found."""
    config = RTN(int4())
    tree, report = quantize_params(params, stats, config)
    for path, leaf in named_leaves(tree, is_qtensor):
        assert is_qtensor(leaf) == (path in stats.products)
        if is_qtensor(leaf):
            leaf.validate()
            shape, contract, out = axes[path]
            assert leaf.shape == shape
            assert leaf.contract == tuple(a - len(shape) for a in contract)
            assert leaf.out == tuple(a - len(shape) for a in out)
    assert {layer.path for layer in report.layers} == set(stats.products)


# ---------------------------------------------------------------------------------------------------- streams of tokens


@pytest.mark.parametrize("sizes", [(24,), (8, 8, 8), (10, 10, 4), (1, 23), (24 * 10,)])
def test_the_cut_into_batches_does_not_matter(sizes):
    x = stream()
    flat = x.reshape(-1, 16) if sum(sizes) > 24 else x
    ends = np.cumsum(sizes)
    stats = calibrate(mlp, mlp_params(), [flat[e - n : e] for n, e in zip(sizes, ends, strict=True)])
    check_mlp(stats, x, np.arange(240))
    assert float(jnp.sum(jnp.any(stats.products["a"].inputs.held_out != 0, -1))) > 8


def test_a_single_batch_has_held_out_rows_and_large_streams_a_bounded_sample():
    x = np.asarray(normal(40, 64, 16))
    stats = calibrate(mlp, mlp_params(), [x])
    check_mlp(stats, x, np.arange(x.shape[0] * 64))
    assert bool(jnp.all(jnp.any(stats.products["a"].inputs.held_out != 0, -1)))  # all of its rows are filled
    assert stats.products["a"].inputs.held_out.shape == (SAMPLE_ROWS, 16)


def test_masked_tokens_are_in_no_statistic():
    x, real = stream(), np.arange(10) < np.arange(1, 25)[:, None] % 11
    x[~real] = 1e6  # would show in every statistic
    batches = [{"x": x[i : i + 6], "mask": real[i : i + 6]} for i in range(0, 24, 6)]
    run = lambda params, batch: mlp(params, batch["x"])  # noqa: E731
    stats = calibrate(run, mlp_params(), batches, mask=lambda batch: batch["mask"])
    keep = real.reshape(-1)
    check_mlp(stats, x.reshape(-1, 16)[keep], np.arange(240)[keep])
    assert stats.notes == ()
    integers = calibrate(run, mlp_params(), batches, mask=lambda batch: batch["mask"].astype(np.int32))
    check_mlp(integers, x.reshape(-1, 16)[keep], np.arange(240)[keep])


def test_a_mask_reaches_flattened_tokens_layers_in_a_scan_and_experts():
    x, real = stream(), np.arange(10) < np.arange(1, 25)[:, None] % 11
    params = {"layers": normal(2, 16, 16), "experts": normal(3, 16, 8)}

    def fn(params, x):
        y = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x.reshape(-1, 16), params["layers"])[0]
        return jnp.einsum("etd,edf->etf", jnp.stack([y, 2 * y, 3 * y]), params["experts"])

    stats = calibrate(fn, params, [x], mask=lambda _: real)
    keep, rows = real.reshape(-1), x.reshape(-1, 16)
    for i in range(2):
        got = jax.tree.map(lambda a, i=i: a[i], stats.products["layers"].inputs)
        check(got, {(): (rows[keep], np.arange(240)[keep])}, (), 16)
        rows = np.asarray(jnp.tanh(rows @ params["layers"][i]))
    for e in range(3):
        got = jax.tree.map(lambda a, e=e: a[e], stats.products["experts"].inputs)
        check(got, {(): ((e + 1) * rows[keep], np.arange(240)[keep])}, (), 16)
    assert stats.notes == ()


def test_a_mask_reaches_experts_that_tokens_are_sorted_for():
    x, real = stream(), np.arange(10) < np.arange(1, 25)[:, None] % 11
    x[~real] *= 1e3  # would show in every statistic
    params = {"gate": normal(16, 3), "up": normal(2, 3, 16, 8), "down": normal(2, 3, 8, 16)}

    def routed(params, rows):
        _, chosen = lax.top_k(rows @ params["gate"], 2)
        order = jnp.argsort(chosen.reshape(-1))
        return order, jnp.bincount(chosen.reshape(-1), length=3).astype(jnp.int32)

    @jax.jit
    def fn(params, x):
        def layer(x, w):
            order, sizes = routed(params, x)
            inner = jax.nn.silu(lax.ragged_dot(x[order // 2], w["up"], sizes))
            given = lax.ragged_dot(inner, w["down"], sizes)[jnp.argsort(order)]
            return jnp.tanh(x + given.reshape(-1, 2, 16).sum(1)), None

        return lax.scan(layer, x.reshape(-1, 16), {k: params[k] for k in ("up", "down")})[0]

    stats = calibrate(fn, params, [x], mask=lambda _: real)
    assert stats.notes == ()
    order, sizes = map(np.asarray, routed(params, jnp.asarray(x.reshape(-1, 16))))
    rows = x.reshape(-1, 16)[order // 2]
    inner = np.asarray(jax.nn.silu(lax.ragged_dot(jnp.asarray(rows), params["up"][0], jnp.asarray(sizes))))
    keep, expert = real.reshape(-1)[order // 2], np.repeat(np.arange(3), sizes)
    for path, inputs in (("up", rows), ("down", inner)):
        first = jax.tree.map(lambda a: a[0], stats.products[path].inputs)
        leads = {(e,): (inputs[keep & (expert == e)], np.flatnonzero(keep & (expert == e))) for e in range(3)}
        check(first, leads, (3,), inputs.shape[1])


def test_a_mask_that_does_not_fit_is_noted_and_all_rows_count():
    def fn(params, x):
        pooled = jnp.mean(x, 1)
        return mlp({"a": params["a"], "b": params["b"]}, x), pooled @ params["head"]

    params = mlp_params() | {"head": normal(16, 4)}
    stats = calibrate(fn, params, [stream()], mask=lambda x: np.ones((24, 10), bool))
    assert [path for path, _ in stats.notes] == ["head"]
    assert "the mask [24, 10] does not fit its input rows [24]" in stats.notes[0][1]
    check(stats.products["head"].inputs, {(): (stream().mean(1), np.arange(24))}, (), 16)


def test_notes_of_every_kind_of_batch_are_kept():
    x = stream()
    fn = lambda params, x: mlp(params, x if x.shape[0] > 4 else jnp.swapaxes(x, 0, 1))  # noqa: E731
    stats = calibrate(fn, mlp_params(), [x[:20], x[20:]], mask=lambda x: np.ones(x.shape[:2], bool))
    assert {path for path, _ in stats.notes} == {"a", "b"}


def test_rows_that_are_not_finite_are_dropped_and_counted():
    x = stream()
    held = np.asarray(token_hash(jnp.arange(240, dtype=jnp.uint32))) % HELD_OUT_EVERY == 0
    for n, where in enumerate((np.flatnonzero(held)[0], np.flatnonzero(~held)[3], np.flatnonzero(~held)[7])):
        x.reshape(-1, 16)[where, n] = (np.nan, np.inf, -np.inf)[n]
    stats = calibrate(lambda params, x: x @ params["a"], mlp_params(), [x[:12], x[12:]])
    check(stats.products["a"].inputs, {(): (x.reshape(-1, 16), np.arange(240))}, (), 16)
    assert int(stats.products["a"].inputs.dropped) == 3


def test_statistics_are_float32_sums_at_highest_precision_for_bfloat16_models():
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), mlp_params())
    x = jnp.asarray(stream(), jnp.bfloat16)
    inputs = calibrate(lambda p, x: x @ p["a"], params, [x]).products["a"].inputs
    assert inputs.gram.dtype == jnp.float32
    check(inputs, {(): (np.asarray(x, np.float32).reshape(-1, 16), np.arange(240))}, (), 16)


def test_statistics_are_float64_for_float64_models(float64):
    params = jax.tree.map(lambda a: a.astype(jnp.float64), mlp_params())
    inputs = calibrate(lambda p, x: x @ p["a"], params, [jnp.asarray(stream(), jnp.float64)]).products["a"].inputs
    assert inputs.gram.dtype == jnp.float64
