"""Codes as 32-bit words, the dense little-endian bitstreams of GPTQ and of compressed-tensors.

The codes of one row or column are one stream; they are stored without a sign, as the code + 2^(bits-1). Up to 4 bits,
such streams are the bytes that a QTensor holds, so nothing is unpacked on the way.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.numerics.packing import pack_bits, packed_size, unpack_bits
from jaxquant.numerics.qtensor import QTensor, is_packed
from jaxquant.numerics.spec import QuantSpec


def words(size: int, bits: int) -> int:
    """Words of a dense stream of codes."""
    return math.ceil(size * bits / 32)


def pack_codes(q: QTensor) -> np.ndarray:
    """The codes of one matrix: a stream per output along its inputs, int32 `[N, words]`."""
    bits = q.spec.bits
    if q.prepared is None and is_packed(q.spec):
        return as_words(np.asarray(q.values).T, math.prod(q.in_shape), bits)
    return pack_unsigned(q.unsigned_codes, bits)


def pack_unsigned(unsigned: jax.Array, bits: int) -> np.ndarray:
    """Codes without a sign `[size, streams]` as words, int32 `[streams, words]`."""
    return as_words(np.asarray(_pack_rows(unsigned, bits)), len(unsigned), bits)


def unpack_signed(packed: np.ndarray, size: int, bits: int) -> jax.Array:
    """Signed codes int8 `[size, streams]` of words `[streams, words]`."""
    return _codes(_as_bytes(packed, size, bits), size, bits)


def unpack_values(packed: np.ndarray, size: int, spec: QuantSpec) -> jax.Array:
    """The `values` `[·, N]` of a QTensor whose codes lie in words `[N, words]`."""
    if is_packed(spec):
        return jnp.asarray(_as_bytes(packed, size, spec.bits).T)
    return unpack_signed(packed, size, spec.bits)


def as_words(rows: np.ndarray, size: int, bits: int) -> np.ndarray:
    """Streams of `size` codes as bytes `[streams, bytes]`, cut or filled up to whole words."""
    return np.ascontiguousarray(_resized(rows, 4 * words(size, bits))).view("<i4")


@partial(jax.jit, static_argnums=1)
def _pack_rows(unsigned: jax.Array, bits: int) -> jax.Array:
    """The streams along the first axis, uint8 `[columns, packed_size]`."""
    return pack_bits(unsigned.T, bits, 1)


@partial(jax.jit, static_argnums=(1, 2))
def _codes(rows: jax.Array, size: int, bits: int) -> jax.Array:
    """Signed codes int8 `[size, rows]` of streams: the inverse of `_pack_rows`."""
    unsigned = unpack_bits(rows, bits, size, 1).T
    return (unsigned.astype(jnp.int16) - jnp.int16(2 ** (bits - 1))).astype(jnp.int8)


def _as_bytes(packed: np.ndarray, size: int, bits: int) -> np.ndarray:
    return _resized(np.ascontiguousarray(packed).view(np.uint8), packed_size(size, bits))


def _resized(rows: np.ndarray, width: int) -> np.ndarray:
    """Cuts off or appends zero bytes: the two paddings of a stream, to whole words and to eight codes."""
    rows = rows[:, :width]
    return np.pad(rows, [(0, 0), (0, width - rows.shape[1])])
