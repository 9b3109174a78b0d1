"""Weights whose codes lie in another order than their inputs, in products, lookups, transformations and files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from small_models import in_order_of_groups, random_qtensor

import jaxquant as jq
from jaxquant.checkpoints.native import load_tree, save_tree
from jaxquant.kernels.matmul import chosen

INT4 = jq.int4(group_size=32, symmetric=False)


def weight(shape=(64, 8), spec=INT4):
    return in_order_of_groups(random_qtensor(shape, spec))


def dense(q):
    """The weight as its docstring says, in NumPy: row i of the codes is that of input `input_order[i]`."""
    codes, scale = np.float64(q.codes), np.repeat(np.float64(q.scale), 32, axis=-2)
    zero = 0 if q.zero_point is None else np.repeat(np.float64(q.zero_point), 32, axis=-2)
    w = np.zeros(codes.shape)
    np.put_along_axis(w, np.broadcast_to(q.input_order, w.shape), (codes - zero) * scale, -2)
    return w if q.channel_scale is None else w / np.float64(q.channel_scale)


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def close(found, expected, rtol=1e-5):
    np.testing.assert_allclose(found, expected, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("platform", [None, "cpu", "tpu"])
@pytest.mark.parametrize("rows", [3, 100])
def test_products_are_those_of_the_dense_weight(platform, rows):
    q, x = weight(), inputs(rows, 64)
    scaled = dataclasses.replace(q, channel_scale=jnp.linspace(0.5, 2, 64)[:, None])
    for w in (q, scaled):
        w.validate()
        close(jq.dequantize(w), dense(w))
        prepared = jq.prepare(w, platform)
        assert chosen(x, prepared) == {None: "reference", "cpu": "cpu", "tpu": "xla"}[platform]
        y = jq.quantized(lambda p, x: x @ p)(prepared, x)
        close(y, np.float64(x) @ dense(w))


def test_the_derivative_in_the_inputs():
    q, x = weight(), inputs(3, 64)
    slope = jax.grad(lambda x: jq.quantized(lambda p, x: x @ p)(q, x).sum())(x)
    close(slope, np.ones((3, 8)) @ dense(q).T)


def test_rounded_inputs_are_summed_as_integers():
    q, x = weight(spec=jq.int4(group_size=32, activations=jq.ActivationSpec())), inputs(3, 64)
    assert chosen(x, q) == "int8"
    y = jq.quantized(lambda p, x: x @ p)(q, x)
    close(y, np.float64(x) @ dense(q), 0.02)


def test_stacks_experts_and_rows():
    q, x = weight((3, 64, 8)), inputs(5, 64)
    w = dense(q)
    close(jq.dequantize(q), w)
    scanned = jq.quantized(lambda p, x: lax.scan(lambda x, w: (x, x @ w), x, p)[1])(q, x)
    batched = jq.quantized(lambda p, x: jnp.einsum("etk,ekn->etn", x, p))(q, jnp.stack([x] * 3))
    close(scanned, np.float64(x) @ w)
    close(batched, np.float64(x) @ w)
    groups = jnp.array([2, 0, 3])
    ragged = jq.quantized(lambda p, x: lax.ragged_dot(x, p, groups))(q, x)
    close(ragged, np.concatenate([x[:2] @ w[0], x[2:] @ w[2]]))
    one = jax.tree.map(lambda a: a[0], q)
    columns = jq.quantized(lambda p, i: jnp.take(p, i, axis=1))(one, jnp.array([3, 1]))
    close(columns, w[0][:, [3, 1]])
    with pytest.raises(TypeError, match="input scales of their own, but it multiplies one input with several"):
        jq.quantized(lambda p, x: jnp.einsum("tk,ekn->etn", x, p))(q, x)


def test_inputs_that_are_split_over_devices_are_refused_and_outputs_are_not():
    q, x, mesh = weight(), inputs(3, 64), Mesh(np.array(jax.devices()[:2]), "d")

    def split(w, x):
        run = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(None, "d")),
                            out_specs=PartitionSpec(None, "d"))  # fmt: skip
        return run(x, w)

    close(jq.quantized(split)(q, x), np.float64(x) @ dense(q))

    def reduced(w, x):
        specs = (PartitionSpec(None, "d"), PartitionSpec("d"))
        product = lambda x, w: lax.psum(x @ w, "d")  # noqa: E731
        return jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())(x, w)

    with pytest.raises(TypeError, match="its input channels are split, and its codes are in another order"):
        jq.quantized(reduced)(q, x)


def test_it_is_saved_and_a_damaged_order_is_refused(tmp_path):
    q = weight((2, 64, 8))
    save_tree(tmp_path / "a", {"w": q})
    again = load_tree(tmp_path / "a")["w"]
    np.testing.assert_array_equal(again.input_order, q.input_order)
    save_tree(tmp_path / "b", {"w": dataclasses.replace(q, input_order=q.input_order % 63)})
    with pytest.raises(ValueError, match="w: input_order does not name every input channel once"):
        load_tree(tmp_path / "b")
    with pytest.raises(ValueError, match=r"input_order is .* contradicts the rest"):
        dataclasses.replace(q, input_order=q.input_order[:, :8]).validate()
