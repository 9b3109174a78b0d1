"""Calibration against statistics recomputed, one product at a time, from plain code."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import CASES, Seen, normal
from jax import lax

from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.spec import int4
from jaxquant.numerics.statistics import HELD_OUT_EVERY, SAMPLE_ROWS, token_hash
from jaxquant.transforms.calibrate import _Program, calibrate
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.tracing import observer

COMPILED: list = []  # durations of all compilations of this process
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: COMPILED.append(seconds) if name.endswith("backend_compile_duration") else None
)


@contextlib.contextmanager
def compilations():
    """A list that counts what is compiled in the context."""
    start, seen = len(COMPILED), []
    yield seen
    seen.extend([1] * (len(COMPILED) - start))


def lead_shape(shape, contract, out):
    return tuple(n for a, n in enumerate(shape) if a not in contract + out)


def axes_of(case, params):
    """Contracting and output axes of every leaf, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}
    last = {p: ((np.ndim(a) - 2,), (np.ndim(a) - 1,)) for p, a in named.items()}
    return {p: (np.shape(named[p]), *case.axes.get(p, last[p])) for p in named}


def oracle(batches, reference, params):
    """`{path: {lead: (rows [T, K], positions [T])}}` over all batches; `reference(params, batch, see)`."""
    found, start = {}, 0
    for batch in batches:
        seen = Seen()
        reference(params, batch, seen)
        for path, leads in seen.inputs.items():
            for lead, pieces in leads.items():
                found.setdefault(path, {}).setdefault(lead, []).extend((x, start + at) for x, at in pieces)
        start += batch.size if jnp.issubdtype(batch.dtype, jnp.integer) else batch.size // batch.shape[-1]
    return {p: {i: tuple(map(np.concatenate, zip(*v, strict=True))) for i, v in d.items()} for p, d in found.items()}


def expected(rows, position, k):
    """Statistics of one matrix's inputs, in float64."""
    rank = np.asarray(token_hash(jnp.asarray(position, jnp.uint32)))
    finite = np.isfinite(rows).all(-1)
    held = rank % HELD_OUT_EVERY == 0
    x = rows[finite & ~held].astype(np.float64)
    order = np.argsort(rank[held & finite], kind="stable")[:SAMPLE_ROWS]
    sample = np.zeros((SAMPLE_ROWS, k))
    sample[: len(order)] = rows[held & finite][order]
    n = max(len(x), 1)
    return {
        "gram": x.T @ x / n,
        "absmax": np.max(np.abs(x), 0, initial=0),
        "mean_abs": np.abs(x).sum(0) / n,
        "count": len(x),
        "dropped": int((~finite).sum()),
        "held_out": sample,
    }


def check(inputs, leads, lead, k):
    """Compares statistics `[*lead, ...]` with the oracle's `{lead: (rows, positions)}`."""
    empty = np.zeros((0, k), np.float32), np.zeros(0, int)
    for at in np.ndindex(lead):
        want = expected(*leads.get(at, empty), k)
        for name, value in want.items():
            got = np.asarray(getattr(inputs, name))
            assert got.shape == lead + np.shape(value), name
            scale = np.max(np.abs(value), initial=0.0) or 1.0
            np.testing.assert_allclose(got[at] / scale, value / scale, atol=1e-5, err_msg=f"{name} at {at}")


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


# ---------------------------------------------------------------------------------------------------- streams of tokens


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def mlp_params():
    return {"a": normal(16, 24), "b": normal(24, 8)}


def mlp_reference(params, x, see):
    see("a", x)
    y = jnp.tanh(x @ params["a"])
    see("b", y)
    return y @ params["b"]


def check_mlp(stats, rows, position, dropped=0):
    """Compares statistics of `mlp` with those of the given input rows at the given positions of the stream."""
    seen = Seen()
    mlp_reference(mlp_params(), rows, seen)
    for path, k in (("a", 16), ("b", 24)):
        x = seen.inputs[path][()][0][0]
        check(stats.products[path].inputs, {(): (x, position)}, (), k)


def stream(n=24, t=10):
    return np.array(normal(n, t, 16, seed=7))


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


# ----------------------------------------------------------------------------------------------------- what is recorded


def test_a_recipe_limits_what_keeps_statistics():
    config = FakeConfig()
    kept = lambda recipe: set(calibrate(mlp, mlp_params(), [stream()], recipe=recipe).products)  # noqa: E731
    assert kept([("a", None), (".*", config)]) == {"b"}
    assert kept([("a", config)]) == {"a"}
    assert kept(config) == {"a", "b"}
    with pytest.raises(ValueError, match="recipe rule 'c' takes no weight that can be quantized"):
        kept([("c", config)])


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    def quantize(self, w, stats):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda w, x: x * w[:1], "`mul`"),
        (lambda w, x: (x @ w, jnp.linalg.norm(w)), "`mul`"),
        (lambda w, x: (x @ w, w @ w.T), "`dot_general`"),
        (lambda w, x: (x @ w, x[:, :8] @ w[:8]), "`dot_general`: it sums over a part of an axis"),
        (lambda w, x: (x @ w, x[:, :8] @ w.reshape(2, 8, 16)[0]), "`dot_general`: it sums over a part of an axis"),
        (lambda w, x: (x @ w, x @ w.T), "products sum over different axes: [(0,), (1,)]"),
        (lambda w, x: (x @ w, x @ w[::-1]), "`rev`"),
        (lambda w, x: (x @ w, lax.scan(lambda w, _: (w * 2, None), w, None, 2)), "`scan`: the weight is carried"),
        (
            lambda w, x: (x @ w, lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w + 1, w)),
            "`while`: the weight is carried",
        ),
        (lambda w, x: (x @ w, lax.cond(jnp.sum(x) > 0, lambda: w, lambda: w.T)), "`cond`: the weight leaves its body"),
        (lambda w, x: (x @ w, lax.scan(lambda c, _: (c, w), 0, None, 2)), "`scan`: the weight leaves its body"),
        (lambda w, x: (x @ w, jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x)), "different axes"),
        (lambda w, x: (x @ w, w.astype(jnp.int32)), "`convert_element_type`"),
        (lambda w, x: (x @ w, w[jnp.array([0, 1]), jnp.array([0, 1])]), "`gather`"),
        (lambda w, x: (x @ w, w.at[0].set(1.0)), "`scatter`"),
    ],
)
def test_uses_that_cannot_be_followed_are_noted(fn, why):
    w = normal(16, 16)
    apply = lambda params, x: (fn(params["w"], x), x @ params["v"])  # noqa: E731
    stats = calibrate(apply, {"w": w, "v": w}, [normal(20, 16)])
    assert "v" in stats.products
    assert [path for path, _ in stats.notes] == ["w"]
    assert why in stats.notes[0][1]
    check(stats.products["v"].inputs, {(): (np.asarray(normal(20, 16)), np.arange(20))}, (), 16)


def test_a_weight_summed_over_two_axes_keeps_no_statistics():
    stats = calibrate(
        lambda w, x: (x @ w["w"], x @ w["w"].T, x @ w["v"]), {"w": normal(16, 16), "v": normal(16, 8)}, [normal(20, 16)]
    )
    assert set(stats.products) == {"v"}


def test_inputs_too_wide_for_a_gram_matrix_are_noted(monkeypatch):
    monkeypatch.setattr(observer, "MAX_CHANNELS", 20)
    stats = calibrate(mlp, mlp_params(), [stream()])
    assert set(stats.products) == {"a"}
    assert stats.notes == (("b", "`dot_general`: a Gram matrix of 24 channels would be too large"),)


def test_casting_an_input_once_per_weight_keeps_one_gram_matrix():
    def fn(params, x):
        return [x.astype(jnp.bfloat16).reshape(-1, 16) @ w.astype(jnp.bfloat16) for w in params]

    stats = calibrate(fn, [normal(16, 8), normal(16, 16)], [stream()])
    assert stats.products["0"].inputs is stats.products["1"].inputs


def test_operations_that_look_alike_are_not_confused():
    def fn(params, x):
        y = x.astype(jnp.bfloat16).astype(jnp.float32)
        a = [jax.jit(lambda i, s=s: jnp.where(i < 2, i + s, i))(x.shape[0] * jnp.int32(0)) for s in (0, 1, 2)]
        return x @ params["a"], y @ params["b"], x.reshape(16, -1).T @ params["c"], [x @ params["l"][i] for i in a]

    params = {k: normal(16, 16, seed=i) for i, k in enumerate("abc")} | {"l": normal(3, 16, 16)}
    x = normal(20, 16)
    inputs = {k: p.inputs for k, p in calibrate(fn, params, [x]).products.items()}
    for name, rows in {"a": x, "b": x.astype(jnp.bfloat16).astype(jnp.float32), "c": x.reshape(16, -1).T}.items():
        check(inputs[name], {(): (np.asarray(rows), np.arange(20))}, (), 16)
    assert inputs["l"].count.tolist() == [inputs["a"].count] * 3


def test_a_model_that_is_quantized_in_part():
    params = mlp_params()
    half = params | {"a": quantize(params["a"], int4(group_size=8))}
    stats = calibrate(quantized(mlp), half, [stream()])
    assert (set(stats.products), stats.notes) == ({"b"}, ())
    rows = np.asarray(jnp.tanh(stream().reshape(-1, 16) @ dequantize(half["a"])))
    check(stats.products["b"].inputs, {(): (rows, np.arange(240))}, (), 24)


def test_paths_are_unique():
    params = {"a/b": normal(16, 8), "a": {"b": normal(16, 8)}}
    with pytest.raises(ValueError, match="two leaves of the parameters have the path 'a/b'"):
        calibrate(lambda p, x: x @ p["a/b"], params, [stream()])


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="calibration needs at least one batch, but `batches` is empty"):
        calibrate(mlp, mlp_params(), iter([]))
    with pytest.raises(ValueError, match="multiplies nothing with a weight of `params`"):
        calibrate(lambda params, x: x + 1, mlp_params(), [stream()])
    other = lambda params, x: x @ params["a"] if len(x) > 3 else mlp(params, x)  # noqa: E731
    with pytest.raises(ValueError, match="uses its weights differently for batches of different shapes"):
        calibrate(other, mlp_params(), [stream(), stream()[:2]])


# ----------------------------------------------------------------------------------------------------------------- cost


def test_equal_shapes_trace_and_compile_once():
    traces = []

    def fn(params, batch):
        traces.append(1)
        return mlp(params, batch["x"]) * (2 if batch["double"] else 1)

    x = stream()
    batches = [{"x": x[i : i + 4], "double": True} for i in range(0, 24, 4)]
    calibrate(fn, mlp_params(), batches[:2])
    assert len(traces) == 1
    with compilations() as seen:
        calibrate(fn, mlp_params(), batches)
    assert len(traces) == 2  # a call traces anew, but compiles ...
    once = list(seen)
    with compilations() as seen:
        calibrate(fn, mlp_params(), batches + batches)
    assert seen == once  # ... no more for more batches


def test_leaves_of_a_batch_that_are_no_arrays_are_static():
    fn = lambda params, batch: mlp(params, batch["x"] * (3 if batch["mode"] == "three" else 1))  # noqa: E731
    x = stream()
    stats = calibrate(fn, mlp_params(), [{"x": x[:12], "mode": "three"}, {"x": x[12:], "mode": None}])
    rows = np.concatenate([3 * x[:12], x[12:]])
    check_mlp(stats, rows, np.arange(240))


def test_cost_is_one_forward_pass_and_one_gram_matrix_per_input():
    t, k, n = 256, 64, 96
    params = {"q": normal(k, n), "k": normal(k, n, seed=1), "o": normal(n, k)}
    fn = lambda p, x: (jnp.tanh(x @ p["q"]) * (x @ p["k"])) @ p["o"]  # noqa: E731
    program = _Program(fn, params, normal(t, k), None, None)
    x, start = normal(t, k), jnp.uint32(0)
    args = (jax.tree.leaves(params), [x], start, None)
    flops = program._compiled.lower(*args).compile().cost_analysis()["flops"]
    forward = 2 * t * k * n * 2  # the last product feeds no statistics, and is not computed
    grams = 2 * t * (k * k + n * n)
    assert forward + grams < flops < 1.3 * (forward + grams)


def test_tracers_do_not_leak():
    with jax.checking_leaks():
        calibrate(CASES["scan"].apply, CASES["scan"].params(), CASES["scan"].batches())
