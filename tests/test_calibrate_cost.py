"""What calibration compiles and computes."""

import jax
import jax.numpy as jnp
import numpy as np
from compilations import compilations
from functions import CASES, normal
from streams import check_mlp, mlp, mlp_params, stream

from jaxquant.transforms.calibrate import _Program, calibrate


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
    args = (program.nothing(), jax.tree.leaves(params), [x], start, None)
    flops = program._compiled.lower(*args).compile().cost_analysis()["flops"]
    forward = 2 * t * k * n * 2  # the last product feeds no statistics, and is not computed
    grams = 2 * t * (k * k + n * n)
    assert forward + grams < flops < 1.3 * (forward + grams)


def test_tracers_do_not_leak():
    with jax.checking_leaks():
        calibrate(CASES["scan"].apply, CASES["scan"].params(), CASES["scan"].batches())
