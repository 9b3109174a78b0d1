"""Weights and inputs as their codes stand for them, with ranges of their own or learned ones."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.methods import lsq
from jaxquant.numerics.affine import (
    Qparams,
    choose_qparams,
    code_limits,
    encode,
    fake_quantize,
    fake_quantize_to,
    per_code,
)
from jaxquant.numerics.layout import from_canonical, to_canonical
from jaxquant.numerics.spec import ActivationSpec, QuantSpec, compute_dtype
from jaxquant.transforms.training.taken import Taken

Ranges = Mapping[str, jax.Array]


def round_weight(w: jax.Array, taken: Taken, ranges: Ranges, spec: QuantSpec) -> jax.Array:
    """The weight that codes of a spec stand for; differentiable in it and in its ranges.

    Args:
      w: float, of the shape that is taken.
      taken: what it is.
      ranges: its learned ranges, if there are any, as in `QATState`.
      spec: that of `taken`, or one with other bits.
    """
    if not taken.learned:
        return fake_quantize(w, spec, contract=taken.contract, out=taken.out)
    canonical = to_canonical(w, taken.contract, taken.out)
    scale, zero_point = learned_qparams(taken, ranges, spec)
    rounded = fake_quantize_to(canonical, *per_code(scale, zero_point, canonical.shape, len(taken.out)), spec)
    return from_canonical(rounded, taken.contract, taken.out, taken.in_shape)


def coded(w: jax.Array, taken: Taken, ranges: Ranges) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes `[*lead, K, *out]`, scales and zero points (int8) of a weight, of its own spec."""
    scale, zero_point = (
        learned_qparams(taken, ranges, taken.spec)
        if taken.learned
        else choose_qparams(w, taken.spec, contract=taken.contract, out=taken.out)
    )
    zero_point = None if zero_point is None else jnp.round(zero_point).astype(jnp.int8)
    return codes_of(w, taken, scale, zero_point), scale, zero_point


def codes_of(w: jax.Array, taken: Taken, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
    """Codes `[*lead, K, *out]` of a weight, with given scales."""
    canonical = to_canonical(w, taken.contract, taken.out)
    return encode(canonical, *per_code(scale, zero_point, canonical.shape, len(taken.out)), taken.spec)


def learned_qparams(taken: Taken, ranges: Ranges, spec: QuantSpec) -> Qparams:
    """Scales and (float) zero points `[*lead, groups, *out]` of a weight, as they are rounded with.

    A learned scale is that of the bits of the weight's own spec: with other bits the range stays the same.
    """
    own = taken.spec
    per_scale = taken.channels // own.num_groups(taken.channels)
    if own.granularity == "per_tensor":
        per_scale *= math.prod(taken.shape[a] for a in taken.out)
    share = lsq.gradient_share(per_scale, own)
    scale, fixed = _scale(ranges["scale"], share, taken), isinstance(spec.bits, int)
    low, high = code_limits(spec, scale.dtype)
    wider = own.steps / (high - low)
    scale = (scale if fixed else scale * wider).astype(taken.scale_dtype)
    if own.symmetric:
        return scale, None
    zero = _slowed(ranges["zero_point"], share)
    return scale, _within(zero if fixed else low + (zero - own.min_code) / wider, low, high)


def _scale(scale: jax.Array, share: float, taken: Taken) -> jax.Array:
    """A learned scale made positive: not 0 in the dtype that it gets, and the square of its inverse finite."""
    least = max(float(jnp.finfo(scale.dtype).eps) ** 2, float(jnp.finfo(taken.scale_dtype).tiny))
    return jnp.maximum(jnp.abs(_slowed(scale, share)), least)


def _slowed(x: jax.Array, share: float) -> jax.Array:
    """x, with `share` of its gradient."""
    return lax.stop_gradient(x) + share * (x - lax.stop_gradient(x))


def _within(zero: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Zero points within the codes. Where a range ends at zero they begin at the last of those, and can come back."""
    passed = jnp.clip(zero, low - 0.5, high + 0.5)
    return lax.stop_gradient(jnp.clip(zero, low, high) - passed) + passed


def initial_ranges(w: jax.Array, taken: Taken) -> dict[str, jax.Array]:
    """Where the learned ranges of a weight start."""
    n = len(taken.lead)
    canonical = to_canonical(w, taken.contract, taken.out)
    flat = canonical.reshape(math.prod(canonical.shape[:n]), canonical.shape[n], -1)
    found = jax.vmap(lambda m: lsq.initial_qparams(m, taken.spec))(flat)
    tensor = taken.spec.granularity == "per_tensor"
    out = (1,) * len(taken.out) if tensor else canonical.shape[n + 1 :]
    scale, zero = jax.tree.map(lambda a: a.reshape(*canonical.shape[:n], a.shape[1], *out), found)
    wide = compute_dtype(w.dtype)
    return {"scale": scale.astype(wide)} | ({} if zero is None else {"zero_point": zero.astype(wide)})


def initial_input_ranges(lowest, highest, mean_abs, taken: Taken) -> dict[str, jax.Array]:
    """Where learned ranges of a weight's inputs start, float `[*lead]`, as the arrays of their statistics are."""
    spec = _activations(taken).spec
    if spec.symmetric:
        scale = lsq.start(mean_abs, spec)
        return {"input_scale": jnp.where(scale > 0, scale, 1)}
    scale, zero = input_qparams(lowest, highest, spec, mean_abs.dtype)
    assert zero is not None
    return {"input_scale": scale, "input_zero_point": zero.astype(scale.dtype)}


def input_qparams(lowest: jax.Array, highest: jax.Array, spec: QuantSpec, dtype) -> Qparams:
    """The scale and zero point of inputs between extremes; all arrays `[*lead]`."""
    reach = jnp.stack([lowest, highest], -1)[..., None]  # one row of two "weights" per matrix
    found = choose_qparams(
        reach, dataclasses.replace(spec, granularity="per_channel", scale_dtype=np.dtype(dtype).name)
    )
    return jax.tree.map(lambda a: a[..., 0, 0], found)


def learned_input_qparams(taken: Taken, ranges: Ranges) -> Qparams:
    """The scale and (float) zero point `[*lead]` of a weight's inputs, as they are rounded with."""
    spec = _activations(taken).spec
    share = lsq.gradient_share(taken.channels, spec)
    scale = _scale(ranges["input_scale"], share, taken)
    limits = code_limits(spec, scale.dtype)
    scale = scale.astype(taken.scale_dtype)
    return scale, None if spec.symmetric else _within(_slowed(ranges["input_zero_point"], share), *limits)


def _activations(taken: Taken) -> ActivationSpec:
    activations = taken.spec.activations
    assert activations is not None
    return activations
