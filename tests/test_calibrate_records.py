"""Which uses of a weight calibration records, shares and notes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import check
from functions import normal
from jax import lax
from streams import mlp, mlp_params, stream

from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.spec import int4
from jaxquant.transforms.calibrate import calibrate
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.tracing import observer


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
        (
            lambda w, x: (x @ w, x @ w.T),
            "its products use its axes differently; (summed over, kept): [((0,), (1,)), ((1,), (0,))]",
        ),
        (lambda w, x: (x @ w, x @ w[::-1]), "`rev`"),
        (lambda w, x: (x @ w, lax.scan(lambda w, _: (w * 2, None), w, None, 2)), "`scan`: the weight is carried"),
        (
            lambda w, x: (x @ w, lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w + 1, w)),
            "`while`: the weight is carried",
        ),
        (
            lambda w, x: (
                x @ w,
                lax.while_loop(lambda c: jnp.sum(x @ c[0]) < c[1], lambda c: (c[0], c[1] - 1), (w, 9.0)),
            ),
            "`dot_general`: it decides when a loop ends",
        ),
        (lambda w, x: (x @ w, lax.cond(jnp.sum(x) > 0, lambda: w, lambda: w.T)), "`cond`: the weight leaves its body"),
        (lambda w, x: (x @ w, lax.scan(lambda c, _: (c, w), 0, None, 2)), "`scan`: the weight leaves its body"),
        (lambda w, x: (x @ w, jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x)), "use its axes differently"),
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
    with pytest.raises(ValueError, match="the batches hold no token"):
        calibrate(mlp, mlp_params(), [stream()[:0]])
    with pytest.raises(ValueError, match="the batches hold no token, or `mask` leaves none"):
        calibrate(mlp, mlp_params(), [stream()], mask=lambda x: jnp.zeros(x.shape[:-1], bool))
    with pytest.raises(ValueError, match="calibration needs at least one batch, but `batches` is empty"):
        calibrate(mlp, mlp_params(), iter([]))
    with pytest.raises(ValueError, match="multiplies nothing with a weight of `params`"):
        calibrate(lambda params, x: x + 1, mlp_params(), [stream()])
    other = lambda params, x: x @ params["a"] if len(x) > 3 else mlp(params, x)  # noqa: E731
    with pytest.raises(ValueError, match="uses its weights differently for batches of different shapes"):
        calibrate(other, mlp_params(), [stream(), stream()[:2]])
