"""The arrays of one weight in compressed-tensors' `pack-quantized` layout.

A Linear `[out, in]` = (N, K) with b-bit codes stores, in place of its `weight`,

    weight_packed      int32 [N, ceil(K·b / 32)]: of each row, the codes + 2^(b-1), a dense little-endian bitstream
    weight_scale       [N, G], G = K / group_size, or 1 per channel; in the model's dtype
    weight_zero_point  int32 [ceil(N·b / 32), G]: of each column, the zero points + 2^(b-1), a stream as above
    weight_shape       int64 [2], (N, K)

and symmetric weights have no zero points.

Source: compressed-tensors 0.20, compressors/pack_quantized. Since its release 0.18 the stream is dense at 3, 5, 6 and 7
bits too; before, a word held only whole codes. The dense layout is written. The older one has the same names and is
read where its width tells it apart: always if 32 divides K. Files with another K and one width for both are taken to
be dense, as upstream takes them.
"""

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.numerics.packing import pack_bits, packed_size, unpack_bits
from jaxquant.numerics.qtensor import QTensor, is_packed
from jaxquant.numerics.spec import QuantSpec

FORMAT = "pack-quantized"
DTYPES = {"weight_packed": "int32", "weight_zero_point": "int32"}  # scales are floats, the shape integers
REQUIRED = {"weight_packed", "weight_shape"}  # the shape says which others there are
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def words(size: int, bits: int) -> int:
    """Words of a dense stream of codes."""
    return math.ceil(size * bits / 32)


def old_words(size: int, bits: int) -> int:
    """Words of a stream of codes as releases before 0.18 wrote it."""
    return math.ceil(size / (32 // bits))


def shapes(n: int, k: int, spec: QuantSpec) -> dict[str, list[tuple[int, ...]]]:
    """The parts that a weight has, and the shapes that each may have."""
    groups = spec.num_groups(k)
    parts: dict[str, list[tuple[int, ...]]] = {
        "weight_packed": [(n, words(k, spec.bits)), (n, old_words(k, spec.bits))],
        "weight_scale": [(n, groups)],
        "weight_shape": [(2,)],
    }
    if not spec.symmetric:
        parts["weight_zero_point"] = [(words(n, spec.bits), groups)]
    return parts


def pack(q: QTensor) -> dict[str, np.ndarray]:
    """A QTensor of one matrix as the arrays of the format."""
    k, n = math.prod(q.in_shape), q.values.shape[-1]
    bits = q.spec.bits
    rows = np.asarray(q.values).T if is_packed(q.spec) else np.asarray(_pack_rows(q.unsigned_codes, bits))
    arrays = {"weight_packed": _as_words(rows, k, bits), "weight_scale": np.ascontiguousarray(np.asarray(q.scale).T)}
    if q.zero_point is not None:
        zeros = np.asarray(_pack_rows(q.unsigned_zero_point.T, bits))
        arrays["weight_zero_point"] = np.ascontiguousarray(_as_words(zeros, n, bits).T)
    return arrays | {"weight_shape": np.array([n, k], np.int64)}


def unpack(arrays: Mapping[str, np.ndarray], spec: QuantSpec) -> QTensor:
    """The QTensor `[K, N]` of the arrays: the inverse of `pack`, with the scale's dtype. Shapes must be right."""
    packed, scale, k = arrays["weight_packed"], arrays["weight_scale"], int(arrays["weight_shape"][1])
    zeros = None
    if not spec.symmetric:
        zeros = _codes(_as_bytes(arrays["weight_zero_point"].T, len(scale), spec.bits), len(scale), spec.bits).T
    if packed.shape[1] != words(k, spec.bits):
        packed = _rearranged(packed, k, spec.bits)
    rows = _as_bytes(packed, k, spec.bits)
    scales = jnp.asarray(scale.T)
    if is_packed(spec):
        return QTensor(jnp.asarray(rows.T), scales, zeros, spec, scale.dtype.name, (-2,), (-1,), (k,))
    return QTensor.from_codes(_codes(rows, k, spec.bits), scales, zeros, spec, dtype=scale.dtype)


@partial(jax.jit, static_argnums=1)
def _pack_rows(unsigned: jax.Array, bits: int) -> jax.Array:
    """The streams along the first axis, uint8 `[columns, packed_size]`."""
    return pack_bits(unsigned.T, bits, 1)


@partial(jax.jit, static_argnums=(1, 2))
def _codes(rows: jax.Array, size: int, bits: int) -> jax.Array:
    """Signed codes int8 `[size, rows]` of streams: the inverse of `_pack_rows`."""
    unsigned = unpack_bits(rows, bits, size, 1).T
    return (unsigned.astype(jnp.int16) - jnp.int16(2 ** (bits - 1))).astype(jnp.int8)


def _rearranged(packed: np.ndarray, size: int, bits: int) -> np.ndarray:
    """The dense words of codes that lie in the older layout."""
    shifts = np.arange(0, 32 - bits + 1, bits, dtype=np.uint32)
    codes = (np.ascontiguousarray(packed).view("<u4")[..., None] >> shifts) & np.uint32(2**bits - 1)
    codes = codes.reshape(len(packed), -1)[:, :size].astype(np.uint8)
    return _as_words(np.asarray(_pack_rows(jnp.asarray(codes.T), bits)), size, bits)


def _as_words(rows: np.ndarray, size: int, bits: int) -> np.ndarray:
    return np.ascontiguousarray(_resized(rows, 4 * words(size, bits))).view("<i4")


def _as_bytes(packed: np.ndarray, size: int, bits: int) -> np.ndarray:
    return _resized(np.ascontiguousarray(packed).view(np.uint8), packed_size(size, bits))


def _resized(rows: np.ndarray, width: int) -> np.ndarray:
    """Cuts off or appends zero bytes: the two paddings of a stream, to whole words and to eight codes."""
    rows = rows[:, :width]
    return np.pad(rows, [(0, 0), (0, width - rows.shape[1])])
