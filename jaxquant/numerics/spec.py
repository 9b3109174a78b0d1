"""What a quantized tensor looks like: bits, symmetry, and which entries share a scale."""

import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp

Granularity = Literal["per_tensor", "per_channel", "per_group", "per_token"]


@dataclasses.dataclass(frozen=True)
class ActivationSpec:
    """How the input of a product with a quantized weight is rounded when the product runs.

    Attributes:
      bits: width of a code, 2 to 8.
      symmetric: as in `QuantSpec`.
      granularity: which entries share a scale: those of one input row (`per_token`) or all (`per_tensor`). Left out, it
        is `per_tensor` where the range is static and `per_token` otherwise.
      static: the scale comes from calibration and is kept with the weight; otherwise from the input itself, as one
        product on one device sees it: inside `shard_map`, from a device's part of a row, and per_tensor inside `vmap`,
        from the whole batch.
      range: what a static range covers: the largest calibration input (`absmax`), all but the largest 0.1 % of a sample
        (`percentile`; if asymmetric, as many at both ends), or what makes the squared error of that sample smallest
        (`mse`).
      outlier_threshold: input channels that reach it in any row stay in floating point (LLM.int8()); None rounds all.
        Only for dynamic per_token ranges.

    Raises:
      ValueError: a field is outside its range, or a static range is per_token.
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Literal["per_token", "per_tensor"] | None = None
    static: bool = False
    range: Literal["absmax", "percentile", "mse"] = "absmax"
    outlier_threshold: float | None = None

    def __post_init__(self):
        if type(self.static) is not bool:
            raise ValueError(f"static={self.static!r} must be True or False")
        granularity = self.granularity or ("per_tensor" if self.static else "per_token")
        if granularity not in ("per_token", "per_tensor"):
            raise ValueError(f"granularity={granularity!r} of activations is neither per_token nor per_tensor")
        if self.static and granularity == "per_token":
            raise ValueError(
                "static activations with granularity='per_token': a static range is per_tensor; leave out static=True "
                "for a dynamic one"
            )
        if self.range not in ("absmax", "percentile", "mse"):
            raise ValueError(f"range={self.range!r} is not one of absmax, percentile, mse")
        if self.range != "absmax" and not self.static:
            raise ValueError(f"range={self.range!r} is for static ranges; a dynamic one is that of the input itself")
        if self.outlier_threshold is not None:
            if not 0 < self.outlier_threshold < math.inf:
                raise ValueError(f"threshold={self.outlier_threshold!r} of outliers must be positive; try 6.0")
            if self.static or granularity != "per_token":
                raise ValueError("an outlier threshold goes with dynamic per_token ranges only")
        object.__setattr__(self, "granularity", granularity)
        _ = self.spec  # raises for the other fields

    @property
    def kind(self) -> str:
        """Where the scale comes from, "static" or "dynamic"."""
        return "static" if self.static else "dynamic"

    @property
    def spec(self) -> "QuantSpec":
        """The codes of the input."""
        return QuantSpec(bits=self.bits, symmetric=self.symmetric, granularity=self.granularity)


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How numbers become integer codes. Frozen and hashable: safe as a static argument of `jax.jit`.

    Attributes:
      bits: width of a code, 2 to 8.
      group_size: entries along the contracting axis that share a scale; None shares one scale along the whole axis.
      symmetric: codes are centred on zero and there is no zero point; otherwise the range is [min, max] of the data,
        widened to include 0.
      granularity: which entries share a scale. Left out, it is `per_group` where a `group_size` is given and
        `per_channel` otherwise. `per_token` is for activations `[..., features]`: one scale per row.
      narrow_range: leave out the most negative code, so that int8 is -127..127 with scale absmax/127.
      scale_dtype: storage dtype of the scale, by name; None is the dtype of the quantized array.
      activations: how the inputs that a quantized weight is multiplied with are rounded; None leaves them as they are.

    Raises:
      ValueError: a field is outside its range, or `group_size` and `granularity` contradict each other.

    Example:
      >>> import jaxquant as jq
      >>> spec = jq.QuantSpec(bits=3, group_size=64, symmetric=False)
      >>> spec.granularity, spec.min_code, spec.max_code
      ('per_group', -4, 3)
    """

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    granularity: Granularity | None = None
    narrow_range: bool = False
    scale_dtype: str | None = None
    activations: ActivationSpec | None = None

    def __post_init__(self):
        self._check_bits()
        for name in ("symmetric", "narrow_range"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise ValueError(f"group_size={self.group_size!r} must be a positive whole number, or None for per-channel")
        derived: Granularity = "per_channel" if self.group_size is None else "per_group"
        granularity = self.granularity or derived
        if granularity not in get_args(Granularity):
            raise ValueError(f"granularity={granularity!r} is not one of {', '.join(get_args(Granularity))}")
        if (granularity == "per_group") != (self.group_size is not None):
            raise ValueError(
                f"granularity={granularity!r} with group_size={self.group_size!r}: "
                "per_group needs a group_size, and every other granularity takes group_size=None"
            )
        if self.scale_dtype not in (None, "bfloat16", "float16", "float32", "float64"):
            raise ValueError(f"scale_dtype={self.scale_dtype!r} is not one of bfloat16, float16, float32, float64")
        if not isinstance(self.activations, ActivationSpec | None):
            raise ValueError(f"activations={self.activations!r} is neither an ActivationSpec nor None")
        object.__setattr__(self, "granularity", granularity)

    def _check_bits(self):  # not where they are traced, see `numerics.bits`
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits!r} is not supported; choose a whole number from 2 to 8")

    @property
    def static_activations(self) -> bool:
        """Whether the scale of the activations comes from calibration."""
        return self.activations is not None and self.activations.static

    @property
    def min_code(self) -> int:
        """The smallest signed code."""
        return -(1 << (self.bits - 1)) + int(self.narrow_range)

    @property
    def max_code(self) -> int:
        """The largest signed code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def steps(self) -> int:
        """Steps between the smallest and the largest code: 2^bits - 1, one less in the narrow range."""
        return self.max_code - self.min_code

    def num_groups(self, size: int) -> int:
        """Scales along a contracting axis of `size` entries.

        Raises:
          ValueError: the group size does not divide the axis; the message lists sizes that do.
        """
        if self.group_size is None:
            return 1
        if size % self.group_size:
            fits = [g for g in (16, 32, 64, 96, 128, 192, 256, 512, size) if size % g == 0]
            raise ValueError(
                f"group_size={self.group_size} does not divide the contracting dimension {size}; "
                f"choose one of {', '.join(map(str, sorted(set(fits))))}, or group_size=None for per-channel"
            )
        return size // self.group_size


def int8(**fields) -> QuantSpec:
    """`QuantSpec(bits=8, **fields)`."""
    return QuantSpec(bits=8, **fields)


def int4(**fields) -> QuantSpec:
    """`QuantSpec(bits=4, **fields)`.

    Example:
      >>> import jaxquant as jq
      >>> jq.int4(group_size=128) == jq.QuantSpec(bits=4, group_size=128)
      True
    """
    return QuantSpec(bits=4, **fields)


def int3(**fields) -> QuantSpec:
    """`QuantSpec(bits=3, **fields)`."""
    return QuantSpec(bits=3, **fields)


def check_weight_spec(spec: QuantSpec) -> None:
    """Raises ValueError unless a method can quantize weights to `spec`."""
    if not isinstance(spec, QuantSpec):
        raise ValueError(f"spec={spec!r} is not a QuantSpec; write for example int4(group_size=128)")
    if spec.granularity == "per_token":
        raise ValueError("per_token is for activations; quantize weights per_group, per_channel or per_tensor")


def with_scale_dtype(spec: QuantSpec, dtype) -> QuantSpec:
    """The spec for a weight of a dtype, which its scales have unless the spec says otherwise."""
    return dataclasses.replace(spec, scale_dtype=spec.scale_dtype or dtype.name)


def compute_dtype(dtype):
    """The dtype in which arithmetic on arrays of `dtype` is done: float64 for float64, float32 for all else."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
