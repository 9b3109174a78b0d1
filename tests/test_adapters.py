"""Adapters of quantized weights, against dense weights with the low-rank part added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, quantize_case
from functions import CASES, normal
from jax import lax
from meshes import P, mesh_of
from programs import computed

import jaxquant as jq
from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.layout import from_canonical
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import ActivationSpec, int4, int8
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.training.lora import lora_init, with_lora


def random(adapters):
    """Adapters that change something."""
    return jax.tree.map(lambda a: a + normal(*a.shape, seed=9), adapters)


def added(qparams, adapters, alpha):
    """Dense weights, with α/r · A B added by NumPy's own sums."""

    def one(q, ab):
        a, b = (np.asarray(ab[k], np.float64) for k in "ab")
        product = alpha / a.shape[-1] * np.einsum("...kr,...rn->...kn", a, b.reshape(*b.shape[: a.ndim - 1], -1))
        product = jnp.asarray(product.reshape(*a.shape[:-1], *b.shape[a.ndim - 1 :]), "float32")
        return dequantize(q) + from_canonical(product, q.contract, q.out, q.in_shape)

    if is_qtensor(qparams):
        return one(qparams, adapters)
    if isinstance(qparams, dict):
        return {k: added(v, adapters[k], alpha) if k in adapters else v for k, v in qparams.items()}
    return [added(v, adapters[str(i)], alpha) for i, v in enumerate(qparams)]


@pytest.mark.parametrize("name", ["scan", "experts_ragged", "experts_vmapped", "heads_in_another_order"])
def test_outputs_and_gradients_are_those_of_the_sum(name):
    case, x = CASES[name], CASES[name].batches()[0]
    qparams, _ = quantize_case(case, int4(group_size=case.group))
    adapters = random(lora_init(jax.random.key(0), qparams, rank=3))

    def gradient(fn):
        return jax.jit(jax.value_and_grad(lambda a: jnp.sum(jnp.sin(fn(a)))))(adapters)

    got = gradient(lambda a: quantized(case.apply)(with_lora(qparams, a, alpha=6), x))
    want = case.apply(added(qparams, adapters, 6), x)
    np.testing.assert_allclose(got[0], jnp.sum(jnp.sin(want)), rtol=1e-4)
    dense = gradient(lambda a: case.apply(dense_sum(qparams, a, 6), x))
    assert_same(got[1], dense[1], 1e-4)


def dense_sum(qparams, adapters, alpha):
    """`added`, so that JAX can differentiate it."""
    return jq.dequantize_params(with_lora(qparams, adapters, alpha=alpha))


def test_gradients_are_those_by_hand():
    """In A, B and the inputs, of y = x Ŵ + α/r · x A B: x' = g Ŵᵀ + α/r · g Bᵀ Aᵀ, A' = α/r · xᵀ g Bᵀ and so on."""
    rng = np.random.default_rng(5)
    q, x, g = quantize(normal(16, 8), int4(group_size=8)), rng.normal(size=(5, 16)), rng.normal(size=(5, 8))
    adapters = random(lora_init(jax.random.key(0), {"w": q}, rank=2))

    def loss(adapters, x):
        y = quantized(lambda p, x: x @ p["w"])(with_lora({"w": q}, adapters, alpha=6), x)
        return jnp.sum(jnp.asarray(g, "float32") * y)

    of_adapters, of_x = jax.grad(loss, (0, 1))(adapters, jnp.asarray(x, "float32"))
    scale = np.repeat(np.asarray(q.scale, np.float64), 8, 0)
    dense, a, b = scale * np.asarray(q.codes), *(np.asarray(adapters["w"][k], np.float64) for k in "ab")
    np.testing.assert_allclose(of_x, g @ dense.T + 3 * g @ b.T @ a.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_adapters["w"]["a"], 3 * x.T @ g @ b.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_adapters["w"]["b"], 3 * (x @ a).T @ g, rtol=1e-4, atol=1e-4)


def test_new_adapters_are_of_the_weights_that_match_and_can_learn():
    qparams = {name: quantize(normal(64, 8), int4()) for name in ("up", "down")}
    (name, new), *others = lora_init(jax.random.key(0), qparams, rank=4, weights="u.*", dtype="bfloat16").items()
    assert (name, others) == ("up", [])
    assert new["a"].dtype == new["b"].dtype == jnp.bfloat16
    assert not np.any(new["b"])
    spread = np.abs(np.asarray(new["a"], np.float32)).max() * 8  # drawn from ±1/√64; with A and B zero, none would move
    assert 0.9 < spread <= 1


def test_a_new_adapter_changes_nothing_and_inputs_are_not_rounded_for_it():
    q, x = quantize(normal(16, 8), int8(activations=ActivationSpec())), normal(5, 16)
    adapters = lora_init(jax.random.key(0), {"w": q}, rank=2)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plain = quantized(fn)({"w": q}, x)
    np.testing.assert_array_equal(quantized(fn)(with_lora({"w": q}, adapters), x), plain)
    adapters = random(adapters)
    got = quantized(fn)(with_lora({"w": q}, adapters), x)
    np.testing.assert_allclose(got, plain + x @ adapters["w"]["a"] @ adapters["w"]["b"], atol=1e-5)


def layers(params, x):
    return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["w"])[0]


def test_frozen_weights_stay_packed():
    """In the arguments of the compiled step, and in what it keeps from the pass forward."""
    depth, width = 6, 128
    qparams = {"w": quantize(normal(depth, width, width), int4(group_size=32))}
    adapters, x = lora_init(jax.random.key(0), qparams, rank=4), normal(8, width)

    def step(adapters, qparams, x):
        return jax.grad(lambda a: jnp.sum(quantized(layers)(with_lora(qparams, a), x)))(adapters)

    held = sum(a.nbytes for a in jax.tree.leaves((qparams, adapters, x)))
    analysis = jax.jit(step).lower(adapters, qparams, x).compile().memory_analysis()
    assert analysis.argument_size_in_bytes == held
    assert held < 0.5 * 4 * depth * width * width
    sizes = [a.size for a in computed(jax.make_jaxpr(step)(adapters, qparams, x).jaxpr) if a.dtype == jnp.float32]
    assert max(sizes) <= width * width  # one layer, dense, where it is used


def test_on_a_mesh_that_splits_the_inputs():
    mesh = mesh_of(data=1, model=8)
    qparams = {"w": quantize(normal(64, 8), int4(group_size=8))}
    joined, x = with_lora(qparams, random(lora_init(jax.random.key(0), qparams, rank=3))), normal(5, 64)

    def fn(params, x):
        inner = lambda w, x: lax.psum(x @ w, "model")  # noqa: E731
        return jax.shard_map(inner, mesh=mesh, in_specs=(P("model", None), P(None, "model")), out_specs=P())(
            params["w"], x
        )

    assert_same(quantized(fn)(joined, x), x @ dequantize(joined["w"]))


def test_saved_and_loaded(tmp_path):
    qparams = {"w": quantize(normal(16, 8), int4(group_size=8))}
    joined = with_lora(qparams, random(lora_init(jax.random.key(0), qparams, rank=2)))
    jq.save(tmp_path / "m", None, joined)
    loaded = jq.load(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, loaded, joined)


def test_bad_adapters_are_refused():
    qparams = {"w": quantize(normal(16, 8), int4()), "b": normal(8)}
    with pytest.raises(ValueError, match=r"weights='v.*' matches no quantized weight; there are: w"):
        lora_init(jax.random.key(0), qparams, weights="v.*")
    with pytest.raises(ValueError, match="rank=0 must be a whole number"):
        lora_init(jax.random.key(0), qparams, rank=0)
    adapters = lora_init(jax.random.key(0), qparams, rank=2)
    with pytest.raises(ValueError, match="the adapter 'v' is of no quantized weight"):
        with_lora(qparams, {"v": adapters["w"]})
    with pytest.raises(ValueError, match="the adapter 'w' has a; expected a and b"):
        with_lora(qparams, {"w": {"a": adapters["w"]["a"]}})
    other = {"w": quantize(normal(32, 8), int4())}
    with pytest.raises(ValueError, match=r"the adapter 'w' is a\[16, 2\] b\[2, 8\]; expected a\[32, 2\] b\[2, 8\]"):
        with_lora(other, adapters)
