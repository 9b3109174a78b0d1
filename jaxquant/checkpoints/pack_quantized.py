"""The arrays of one weight in compressed-tensors' `pack-quantized` layout.

A Linear `[out, in]` = (N, K) with b-bit codes stores, in place of its `weight`,

    weight_packed      int32 [N, ceil(K·b / 32)]: of each row, the codes + 2^(b-1), a dense little-endian bitstream
    weight_scale       [N, G], G = K / group_size, or 1 per channel; in the model's dtype
    weight_zero_point  int32 [ceil(N·b / 32), G]: of each column, the zero points + 2^(b-1), a stream as above
    weight_shape       int64 [2], (N, K)

and symmetric weights have no zero points.

Source: compressed-tensors 0.20, compressors/pack_quantized. Since its release 0.18 the stream is dense at 3, 5, 6 and 7
bits too; before, a word held only whole codes. The dense layout is written. The older one has the same names and is
read where its width tells it apart: always if 32 divides K and N. Streams of one width in both are taken to be dense,
as upstream takes them.
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints.words import pack_codes, pack_unsigned, unpack_signed, unpack_values, words
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec

FORMAT = "pack-quantized"
DTYPES = {"weight_packed": "int32", "weight_zero_point": "int32"}  # scales are floats, the shape integers
REQUIRED = {"weight_packed", "weight_shape"}  # the shape says which others there are
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


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
        parts["weight_zero_point"] = [(words(n, spec.bits), groups), (old_words(n, spec.bits), groups)]
    return parts


def pack(q: QTensor) -> dict[str, np.ndarray]:
    """A QTensor of one matrix as the arrays of the format."""
    k, n = math.prod(q.in_shape), q.values.shape[-1]
    arrays = {"weight_packed": pack_codes(q), "weight_scale": np.ascontiguousarray(np.asarray(q.scale).T)}
    if q.zero_point is not None:
        zeros = pack_unsigned(q.unsigned_zero_point.T, q.spec.bits)
        arrays["weight_zero_point"] = np.ascontiguousarray(zeros.T)
    return arrays | {"weight_shape": np.array([n, k], np.int64)}


def unpack(arrays: Mapping[str, np.ndarray], spec: QuantSpec) -> QTensor:
    """The QTensor `[K, N]` of the arrays: the inverse of `pack`, with the scale's dtype. Shapes must be right."""
    packed, scale, k = arrays["weight_packed"], arrays["weight_scale"], int(arrays["weight_shape"][1])
    zeros = None
    if not spec.symmetric:
        zeros = unpack_signed(_dense(arrays["weight_zero_point"].T, len(scale), spec.bits), len(scale), spec.bits).T
    values = unpack_values(_dense(packed, k, spec.bits), k, spec)
    return QTensor(values, jnp.asarray(scale.T), zeros, spec, scale.dtype.name, (-2,), (-1,), (k,))


def _dense(packed: np.ndarray, size: int, bits: int) -> np.ndarray:
    """The dense words of streams of codes that may lie in the older layout."""
    if packed.shape[1] == words(size, bits):
        return packed
    shifts = np.arange(0, 32 - bits + 1, bits, dtype=np.uint32)
    codes = (np.ascontiguousarray(packed).view("<u4")[..., None] >> shifts) & np.uint32(2**bits - 1)
    codes = codes.reshape(len(packed), -1)[:, :size].astype(np.uint8)
    return pack_unsigned(jnp.asarray(codes.T), bits)
