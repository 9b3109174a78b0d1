"""QTensor: layouts, packing, what it costs in memory, and what JAX does with it."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.packing import pack_bits, packed_size, unpack_bits
from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.numerics.spec import QuantSpec, int4, int8

LAYOUTS = {  # shape, contracting axes, output axes, the weight in canonical order
    "[in, out]": ((24, 5), (-2,), (-1,), "io->io"),
    "[out, in]": ((5, 24), (-1,), (-2,), "oi->io"),
    "[d, heads, head_dim]": ((24, 2, 3), (-3,), (-2, -1), "ihd->ihd"),
    "[heads, head_dim, d]": ((4, 6, 5), (-3, -2), (-1,), "hdo->hdo"),
    "[expert, in, out]": ((3, 24, 5), (-2,), (-1,), "eio->eio"),
    "[expert, out, in]": ((3, 5, 24), (-1,), (-2,), "eoi->eio"),
    "[in, layer, out]": ((24, 3, 5), (-3,), (-1,), "ilo->lio"),
    "[layer, heads, d, head_dim]": ((2, 4, 5, 6), (-3, -1), (-2,), "lhod->lhdo"),
    "[features]": ((24,), (-1,), (), "i->i"),
}


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("spec", [int4(group_size=8, symmetric=False), int8()], ids=["int4 group", "int8 channel"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_run_along_the_flattened_contracting_axes(layout, spec):
    shape, contract, out, order = LAYOUTS[layout]
    x = np.random.default_rng(0).normal(size=shape)
    q = quantize(jnp.asarray(x), spec, contract=contract, out=out)
    q.validate()
    assert (q.shape, q.ndim, q.size) == (shape, len(shape), x.size)
    w = np.einsum(order, x)
    lead, out_shape = w.shape[: w.ndim - len(contract + out)], w.shape[w.ndim - len(out) :]
    matrices = w.reshape(-1, 24, math.prod(out_shape))
    args = spec.bits, spec.symmetric, spec.granularity, spec.group_size
    codes, scale, zero = (np.stack(a) for a in zip(*(oracles.rtn(m, *args) for m in matrices), strict=True))
    np.testing.assert_array_equal(q.codes, codes.reshape(*lead, 24, *out_shape))
    np.testing.assert_array_equal(q.scale, scale.reshape(*lead, -1, *out_shape))
    rows, columns = oracles.groups_of(matrices.shape[1:], spec.granularity, spec.group_size)
    back = (codes - zero[:, rows, columns]) * scale[:, rows, columns]
    np.testing.assert_array_equal(np.einsum(order, dequantize(q)), back.reshape(w.shape))


@pytest.mark.parametrize("bits", range(2, 9))
def test_memory_is_what_nbytes_says(bits):
    q = quantize(weights(256, 64), QuantSpec(bits, group_size=32, symmetric=False, scale_dtype="bfloat16"))
    stored = bits if bits <= 4 else 8
    assert q.values.on_device_size_in_bytes() == 256 * 64 * stored / 8
    assert q.nbytes == sum(a.on_device_size_in_bytes() for a in (q.values, q.scale, q.zero_point))
    assert q.nbytes == 256 * 64 * stored / 8 + 8 * 64 * (2 + 1)
    assert q.bits_per_weight == stored + (16 + 8) / 32


@pytest.mark.parametrize("bits", range(2, 9))
def test_signed_and_unsigned_codes(bits):
    signed = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int8)[:, None]
    spec = QuantSpec(bits, symmetric=False)
    zero = jnp.full((1, 1), -(2 ** (bits - 1)), jnp.int8)
    q = QTensor.from_codes(jnp.asarray(signed), jnp.ones((1, 1)), zero, spec, dtype="float32")
    q.validate()
    np.testing.assert_array_equal(q.codes, signed)
    np.testing.assert_array_equal(q.unsigned_codes[:, 0], np.arange(2**bits))
    assert (q.unsigned_codes.dtype, q.unsigned_zero_point.dtype) == (jnp.uint8, jnp.uint8)
    assert q.unsigned_zero_point == 0
    symmetric = dataclasses.replace(q, zero_point=None, spec=QuantSpec(bits))
    assert symmetric.unsigned_zero_point == 2 ** (bits - 1)


@hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=30)
@hypothesis.given(bits=st.integers(2, 8), size=st.sampled_from([1, 7, 8, 9, 33]), seed=st.integers(0, 2**32 - 1))
def test_packing_is_the_little_endian_bitstream(bits, size, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, size)
    stream = pack_bits(jnp.asarray(codes), bits, 0)
    assert (stream.dtype, stream.shape) == (jnp.uint8, (packed_size(size, bits),))
    np.testing.assert_array_equal(stream, oracles.pack(codes, bits))
    np.testing.assert_array_equal(unpack_bits(stream, bits, size, 0), codes)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_packing_goes_along_any_axis(axis):
    codes = np.random.default_rng(0).integers(0, 8, (5, 11, 4))
    stream = pack_bits(jnp.asarray(codes), 3, axis)
    np.testing.assert_array_equal(stream, np.apply_along_axis(oracles.pack, axis, codes, 3))
    np.testing.assert_array_equal(unpack_bits(stream, 3, codes.shape[axis], axis), codes)


def test_a_stream_of_another_length_is_refused():
    with pytest.raises(ValueError, match="16 codes of 4 bits take 8 bytes, but axis 0 of the stream"):
        unpack_bits(jnp.zeros((9, 2), jnp.uint8), 4, 16, 0)


def test_stacked_layers_are_sliced_stacked_scanned_and_vmapped():
    w, x = weights(3, 24, 5), weights(24, seed=1)
    q = quantize(w, int4(group_size=8, symmetric=False))
    layers = [quantize(w[i], q.spec) for i in range(3)]
    for i, layer in enumerate(layers):
        sliced = jax.tree.map(lambda a, i=i: a[i], q)
        sliced.validate()
        assert jax.tree.structure(sliced) == jax.tree.structure(layer)
        jax.tree.map(np.testing.assert_array_equal, sliced, layer)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda *a: jnp.stack(a), *layers), q)
    expected = np.einsum("i,lio->lo", x, dequantize(q))
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, x @ dequantize(layer)), None, q)
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda layer: x @ dequantize(layer))(q), expected, rtol=1e-5, atol=1e-5)


def test_it_is_a_pytree_of_its_arrays():
    q = quantize(weights(24, 5), int4(symmetric=False))
    leaves, structure = jax.tree.flatten(q)
    assert [a.dtype for a in leaves] == [jnp.uint8, jnp.float32, jnp.int8]
    again = jax.jit(lambda q: q)(q)
    assert again.spec == q.spec
    assert jax.tree.structure(again) == structure
    assert jax.tree.unflatten(structure, [None] * 3).values is None  # never validated on the way
    assert is_qtensor(q)
    assert not is_qtensor(q.values)
    assert jax.tree.leaves({"a": q}, is_leaf=is_qtensor) == [q]


def broken(change):
    q = quantize(weights(24, 5), int4(group_size=8, symmetric=False))
    return dataclasses.replace(q, **change(q))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: {"values": q.codes}, r"values is int8\[24, 5\], which contradicts"),
        (lambda q: {"values": q.values[:-1]}, r"values is uint8\[11, 5\], which contradicts"),
        (lambda q: {"in_shape": (26,)}, r"values is uint8\[12, 5\], which contradicts"),
        (lambda q: {"scale": q.scale[:1]}, r"scale is float32\[1, 5\], which contradicts"),
        (lambda q: {"scale": q.scale[:, :1]}, r"scale is float32\[3, 1\], which contradicts"),
        (lambda q: {"scale": q.zero_point}, "scale has dtype int8, which is not a float"),
        (lambda q: {"zero_point": None}, "symmetric=False, but zero_point is None"),
        (lambda q: {"spec": int4(group_size=8)}, "symmetric=True, but zero_point is"),
        (lambda q: {"zero_point": q.zero_point[0]}, r"zero_point is int8\[5\], which contradicts"),
        (lambda q: {"zero_point": q.scale}, r"zero_point is float32\[3, 5\], which contradicts"),
        (lambda q: {"spec": int4(group_size=7, symmetric=False)}, "group_size=7 does not divide"),
        (lambda q: {"contract": (-1,)}, "expected different negative axes"),
    ],
)
def test_validate_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        broken(change).validate()
