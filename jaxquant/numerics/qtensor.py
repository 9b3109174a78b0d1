"""The quantized tensor: a pytree, so `jit`, `vmap`, `scan`, Orbax and optax already know it."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxquant.numerics import layout
from jaxquant.numerics.packing import pack_bits, packed_size, unpack_bits
from jaxquant.numerics.prepared import Prepared
from jaxquant.numerics.spec import QuantSpec

PACKED_BITS = 4  # codes of this width or less are stored as a dense bitstream


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("values", "scale", "zero_point", "input_scale", "input_zero_point", "channel_scale"),
        *("outlier_index", "outlier_weight", "input_order", "adapter_in", "adapter_out"),
    ],
    meta_fields=["spec", "dtype", "contract", "out", "in_shape", "prepared"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """Integer codes with their scales: `x ≈ (codes - zero_point) · scale / channel_scale + adapter_in · adapter_out`.

    Every array is kept in the canonical layout `[*lead, ·, *out]` (see `numerics.layout`), whatever the axes of the
    weight it stands for. Leading (layer, expert) axes are ordinary leading axes of every array, so a QTensor can be
    stacked, scanned, vmapped and sharded along them, and sliced where they also come first in the weight. With K the
    product of the contracting axes and G the number of groups along them (1 per channel, per token and per tensor):

    Attributes:
      values: the codes. 5 to 8 bits: int8 `[*lead, K, *out]`. 2 to 4 bits: uint8 `[*lead, packed_size(K), *out]`, the
        codes minus the smallest code of the width, as a dense bitstream along K (bits/8 bytes per code).
      scale: float `[*lead, G, *out]`; with per_tensor granularity, 1 along every `out` axis.
      zero_point: int8, the code of 0.0, shaped as `scale`; None if the spec is symmetric.
      spec: the QuantSpec that the codes obey, which also says how inputs are rounded.
      dtype: name of the dtype of the weight it stands for, which `dequantize` returns.
      contract: negative axes of the weight that a product sums over, ascending.
      out: negative axes of the weight's outputs, ascending; every other axis is a leading one.
      in_shape: sizes of the contracting axes (the packed stream does not tell them).
      input_scale: float `[*lead, 1, 1, ...]` with as many axes as `scale`, the scale of the inputs' codes; None unless
        `spec.activations` is static.
      input_zero_point: int8, the inputs' code of 0.0, shaped as `input_scale`; None unless their static range is
        asymmetric.
      channel_scale: positive float `[*lead, K, 1, ...]` with as many axes as `scale`: what each input channel of the
        weight was multiplied with before it was rounded. A product divides its input by it, before that is rounded.
        None is 1.
      outlier_index: int32 `[*lead, k, 1, ...]` with as many axes as `scale`, input channels of which float rows are
        kept, K where there is none; None unless `spec.activations` has an outlier threshold.
      outlier_weight: those rows, `[*lead, k, *out]`, in the dtype of the weight.
      input_order: int32 `[*lead, K, 1, ...]` with as many axes as `scale`, the input channel that each row of codes
        belongs to, where those that share a scale do not lie together (act-order checkpoints from elsewhere). A product
        divides its input by the channel scale, and then takes it in this order. None is the channels' own.
      adapter_in: float `[*lead, K·r, 1, ...]` with as many axes as `scale`, the factor `[K, r]` of a low-rank part of
        the weight that is kept in floating point (LoRA), row by row; None where there is none.
      adapter_out: its other factor, float `[*lead, r, *out]`. A product multiplies them with its input as it is,
        neither divided nor rounded.
      prepared: for whose kernels `values` have been re-laid (see `numerics.prepared`); None is the layout above.

    These lines are checked by `validate`, which is never called when JAX rebuilds the pytree: inside transformations
    the leaves may be tracers, specs or None.
    """

    values: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    spec: QuantSpec
    dtype: str
    contract: tuple[int, ...]
    out: tuple[int, ...]
    in_shape: tuple[int, ...]
    input_scale: jax.Array | None = None
    input_zero_point: jax.Array | None = None
    channel_scale: jax.Array | None = None
    outlier_index: jax.Array | None = None
    outlier_weight: jax.Array | None = None
    input_order: jax.Array | None = None
    adapter_in: jax.Array | None = None
    adapter_out: jax.Array | None = None
    prepared: Prepared | None = None

    @classmethod
    def from_codes(
        cls, codes, scale, zero_point, spec, *, dtype, contract=(-2,), out=(-1,), in_shape=None
    ) -> "QTensor":
        """Packs signed int8 codes `[*lead, K, *out]`; the other arguments are the attributes above."""
        axis = codes.ndim - 1 - len(out)
        in_shape = (codes.shape[axis],) if in_shape is None else tuple(in_shape)
        name = jnp.dtype(dtype).name
        return cls(_plain(codes, spec, axis), scale, zero_point, spec, name, tuple(contract), tuple(out), in_shape)

    @property
    def codes(self) -> jax.Array:
        """Signed codes, int8 `[*lead, K, *out]`."""
        if self.prepared is not None:
            return self.prepared.codes(self.values, self.spec.bits, self._axis)
        if not is_packed(self.spec):
            return self.values
        u = unpack_bits(self.values, self.spec.bits, math.prod(self.in_shape), self._axis)
        return u.astype(jnp.int8) - jnp.int8(2 ** (self.spec.bits - 1))

    def laid_out(self, prepared: Prepared | None) -> "QTensor":
        """The same codes, laid out for other kernels; None is the plain layout."""
        if prepared == self.prepared:
            return self
        if prepared is None:
            values = _plain(self.codes, self.spec, self._axis)
        else:
            values = prepared.lay(self.codes, self.spec.bits, self._axis)
        return dataclasses.replace(self, values=values, prepared=prepared)

    @property
    def contract_last(self) -> bool:
        """Whether K is the last axis of `values`, behind the output axes."""
        return self.prepared is not None and self.prepared.contract_last

    @property
    def unsigned_codes(self) -> jax.Array:
        """The textbook's codes in [0, 2^bits), uint8 `[*lead, K, *out]`."""
        return _unsigned(self.codes, self.spec)

    @property
    def unsigned_zero_point(self) -> jax.Array:
        """The textbook's zero point in [0, 2^bits), uint8, shaped as `scale`; 2^(bits-1) where symmetric."""
        zero = jnp.zeros(self.scale.shape, jnp.int8) if self.zero_point is None else self.zero_point
        return _unsigned(zero, self.spec)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it stands for."""
        lead, out = self._outer_shape
        return layout.logical_shape(lead, self.in_shape, out, self.contract, self.out)

    @property
    def ndim(self) -> int:
        """Axes of the weight it stands for."""
        return self._axis + len(self.in_shape) + len(self.out)

    @property
    def size(self) -> int:
        """Entries of the weight it stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays really take in memory, scales and zero points included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits in memory per weight, scales and zero points included."""
        return 8 * self.nbytes / self.size

    @property
    def _axis(self) -> int:  # of K in every array, which is also the number of leading axes
        return self.values.ndim - 1 - len(self.out)

    @property
    def _outer_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of the leading and of the output axes."""
        sizes, axis = self.values.shape, self._axis
        return sizes[:axis], sizes[axis:-1] if self.contract_last else sizes[axis + 1 :]

    def validate(self) -> None:
        """Checks the invariants above.

        Raises:
          ValueError: one does not hold; the message names it.
        """
        layout.check_layout(self.ndim, self.contract, self.out)
        if len(self.in_shape) != len(self.contract) or min(self.in_shape) < 0:
            raise ValueError(f"in_shape={self.in_shape} is no size for each of contract={self.contract}")
        size, (lead, whole_out) = math.prod(self.in_shape), self._outer_shape
        self._validate_values(size)
        out = (1,) * len(whole_out) if self.spec.granularity == "per_tensor" else whole_out
        shape = (*lead, self.spec.num_groups(size), *out)
        _expect("scale", self.scale, self.scale.dtype, self.scale.shape == shape)
        if not jnp.issubdtype(self.scale.dtype, jnp.floating):
            raise ValueError(f"scale has dtype {self.scale.dtype}, which is not a float")
        if (self.zero_point is None) != self.spec.symmetric:
            raise ValueError(f"symmetric={self.spec.symmetric}, but zero_point is {self.zero_point}")
        if self.zero_point is not None:
            _expect("zero_point", self.zero_point, jnp.int8, self.zero_point.shape == shape)
        if (self.input_scale is not None) != self.spec.static_activations:
            raise ValueError(f"activations={self.spec.activations}, but input_scale is {self.input_scale}")
        if self.input_scale is not None:
            right = self.input_scale.shape == (*lead, *(1,) * (len(shape) - len(lead)))
            _expect("input_scale", self.input_scale, self.scale.dtype, right)
        self._validate_input_zero_point()
        if self.channel_scale is not None:
            right = self.channel_scale.shape == (*lead, size, *(1,) * len(out))
            _expect("channel_scale", self.channel_scale, self.scale.dtype, right)
        if self.input_order is not None:
            right = self.input_order.shape == (*lead, size, *(1,) * len(out))
            _expect("input_order", self.input_order, jnp.int32, right and self.outlier_index is None)
        self._validate_outliers(lead, whole_out)
        self._validate_adapter(size, lead, whole_out)

    def _validate_values(self, size: int) -> None:
        bits, axis = self.spec.bits, self._axis
        if self.prepared is None:
            packed = is_packed(self.spec)
            rows, dtype = (packed_size(size, bits), jnp.uint8) if packed else (size, jnp.int8)
        else:
            shared = self.prepared.shares_bytes(bits)
            rows, dtype = (size // 2, jnp.int8) if shared else (size, jnp.int4 if bits <= PACKED_BITS else jnp.int8)
            axis = -1 if self.contract_last else axis
        _expect("values", self.values, dtype, self.values.shape[axis] == rows)

    def _validate_input_zero_point(self) -> None:
        zero, activations = self.input_zero_point, self.spec.activations
        wanted = activations is not None and activations.static and not activations.symmetric
        if (zero is not None) != wanted:
            raise ValueError(f"activations={activations}, but input_zero_point is {zero}")
        if zero is not None and self.input_scale is not None:
            _expect("input_zero_point", zero, jnp.int8, zero.shape == self.input_scale.shape)

    def _validate_outliers(self, lead: tuple[int, ...], out: tuple[int, ...]) -> None:
        activations, (index, rows) = self.spec.activations, (self.outlier_index, self.outlier_weight)
        threshold = None if activations is None else activations.outlier_threshold
        if not (threshold is None) == (index is None) == (rows is None):
            raise ValueError(f"activations={activations}, but outlier_index is {index} and outlier_weight {rows}")
        if index is not None and rows is not None:
            kept = rows.shape[len(lead)] if rows.ndim > len(lead) else 0
            _expect("outlier_index", index, jnp.int32, index.shape == (*lead, kept, *(1,) * len(out)))
            _expect("outlier_weight", rows, jnp.dtype(self.dtype), rows.shape == (*lead, kept, *out))

    def _validate_adapter(self, size: int, lead: tuple[int, ...], out: tuple[int, ...]) -> None:
        first, second = self.adapter_in, self.adapter_out
        if (first is None) != (second is None):
            raise ValueError(f"adapter_in is {first}, but adapter_out is {second}")
        if first is not None and second is not None:
            rank = second.shape[len(lead)] if second.ndim > len(lead) else 0
            _expect("adapter_in", first, second.dtype, first.shape == (*lead, size * rank, *(1,) * len(out)))
            _expect("adapter_out", second, first.dtype, second.shape == (*lead, rank, *out))


def _plain(codes, spec, axis):  # as they lie where no platform is known
    return pack_bits(codes + jnp.int8(2 ** (spec.bits - 1)), spec.bits, axis) if is_packed(spec) else codes


def _unsigned(codes, spec):  # codes - the smallest code of the width; int8 arithmetic would overflow at 8 bits
    return (codes.astype(jnp.int16) + jnp.int16(2 ** (spec.bits - 1))).astype(jnp.uint8)


def _expect(name, array, dtype, right_shape):
    if array.dtype != dtype or not right_shape:
        raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, which contradicts the rest of the QTensor")


def is_packed(spec: QuantSpec) -> bool:
    """Whether codes are stored as a dense bitstream; those of a width that is not known yet are not."""
    return isinstance(spec.bits, int) and spec.bits <= PACKED_BITS


def is_qtensor(leaf) -> bool:
    """True for a QTensor: the `is_leaf` of tree functions that treat one as a single leaf."""
    return isinstance(leaf, QTensor)


def more_than_codes(q: QTensor) -> list[str]:
    """Names of what a weight has, and needs, beside codes and scales, and of another layout of its codes."""
    more = ("channel_scale", "outlier_index", "input_order", "adapter_in", "prepared")
    return [name for name in more if getattr(q, name) is not None]


def holds_qtensors(tree) -> bool:
    """Whether a leaf of a tree is a QTensor."""
    return any(map(is_qtensor, jax.tree.leaves(tree, is_leaf=is_qtensor)))
