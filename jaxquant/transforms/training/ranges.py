"""Weights and inputs as their codes stand for them, with ranges of their own or learned ones."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.methods import lsq
from jaxquant.numerics.affine import Qparams, choose_qparams, fake_quantize, fake_quantize_to, per_code
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
    scale, zero_point = learned_qparams(w.dtype, taken, ranges, spec)
    rounded = fake_quantize_to(canonical, *per_code(scale, zero_point, canonical.shape, len(taken.out)), spec)
    return from_canonical(rounded, taken.contract, taken.out, tuple(w.shape[a] for a in taken.contract))


def learned_qparams(dtype, taken: Taken, ranges: Ranges, spec: QuantSpec) -> Qparams:
    """Scales and (float) zero points `[*lead, groups, *out]` of a weight of some dtype, as they are rounded with.

    A learned scale is that of the bits of the weight's own spec: with other bits the range stays the same.
    """
    own = taken.config.spec
    per_scale = taken.channels // own.num_groups(taken.channels)
    if own.granularity == "per_tensor":
        per_scale *= math.prod(taken.shape[a] for a in taken.out)
    share = lsq.gradient_share(per_scale, own)
    scale = _scale(ranges["scale"], share)
    if spec is not own:
        scale = scale * (own.steps / jnp.asarray(spec.steps).astype(scale.dtype))
    scale = scale.astype(jnp.dtype(own.scale_dtype or dtype))
    if own.symmetric:
        return scale, None
    zero = _slowed(ranges["zero_point"], share)
    if spec is not own:
        zero = spec.min_code + (zero - own.min_code) * (jnp.asarray(spec.steps).astype(zero.dtype) / own.steps)
    return scale, _clamped(zero, spec)


def _scale(scale: jax.Array, share: float) -> jax.Array:
    """A learned scale made positive."""
    return jnp.maximum(jnp.abs(_slowed(scale, share)), float(jnp.finfo(scale.dtype).tiny))


def _slowed(x: jax.Array, share: float) -> jax.Array:
    """x, with `share` of its gradient."""
    return lax.stop_gradient(x) + share * (x - lax.stop_gradient(x))


def _clamped(zero: jax.Array, spec: QuantSpec) -> jax.Array:
    """A zero point that is a code."""
    limits = (jnp.asarray(a).astype(zero.dtype) for a in (spec.min_code, spec.max_code))
    return jnp.clip(zero, *limits)


def initial_ranges(w: jax.Array, taken: Taken) -> dict[str, jax.Array]:
    """Where the learned ranges of a weight start."""
    n = len(taken.lead)
    canonical = to_canonical(w, taken.contract, taken.out)
    flat = canonical.reshape(math.prod(canonical.shape[:n]), canonical.shape[n], -1)
    found = jax.vmap(lambda m: lsq.initial_qparams(m, taken.config.spec))(flat)
    tensor = taken.config.spec.granularity == "per_tensor"
    out = (1,) * len(taken.out) if tensor else canonical.shape[n + 1 :]
    scale, zero = jax.tree.map(lambda a: a.reshape(*canonical.shape[:n], a.shape[1], *out), found)
    wide = compute_dtype(w.dtype)
    return {"scale": scale.astype(wide)} | ({} if zero is None else {"zero_point": zero.astype(wide)})


def initial_input_ranges(lowest, highest, mean_abs, spec: QuantSpec) -> dict[str, jax.Array]:
    """Where learned ranges of inputs start, float `[*lead]`; arguments likewise, spec that of the codes."""
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


def learned_input_qparams(taken: Taken, ranges: Ranges, dtype) -> Qparams:
    """The scale and (float) zero point `[*lead]` of a weight's inputs, as they are rounded with."""
    spec = _activations(taken).spec
    share = lsq.gradient_share(taken.channels, spec)
    scale = _scale(ranges["input_scale"], share).astype(dtype)
    if spec.symmetric:
        return scale, None
    return scale, _clamped(_slowed(ranges["input_zero_point"], share), spec)


def _activations(taken: Taken) -> ActivationSpec:
    activations = taken.config.spec.activations
    assert activations is not None
    return activations
