"""Moves channel scales into what makes the inputs they divide, where a model says what that is.

Products divide their input x by the channel scale d of their weight. Where x = g · n (a norm with scale g), g / d makes
that division, and where x is an output of a linear layer, so does a division of its columns and bias: then the scale
is gone from the weight, and formats without a place for it can store the model. Nothing changes but rounding errors.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.numerics.affine import dequantize
from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.numerics.spec import compute_dtype
from jaxquant.transforms.tracing.interpreter import named_leaves


class FoldPair(NamedTuple):
    """What makes an input, and who reads it; paths in the parameter tree.

    Attributes:
      sources: arrays whose last axis are the channels: the scale (and bias) of a norm, or the kernel and bias of a
        linear layer. Where that axis is longer, as of a fused projection, its end are the channels. Every channel of
        the input must be proportional to that channel of each of them.
      readers: the kernels `[*lead, in, out]` of all products with that input, quantized or not. Some may have more
        leading axes than others: experts, which must all have the same scale.
      offset: what is added to the sources where they are used: 1 for a norm that multiplies with 1 + scale.
    """

    sources: tuple[str, ...]
    readers: tuple[str, ...]
    offset: float = 0.0

    def among(self, paths: Collection[str]) -> "FoldPair":
        """The pair without paths that are not among those given."""
        sources, readers = (tuple(path for path in own if path in paths) for own in (self.sources, self.readers))
        return FoldPair(sources, readers, self.offset)


def fold(params: Any, pairs: Sequence[FoldPair]) -> Any:
    """Removes channel scales from a parameter tree.

    Readers that are not quantized are multiplied with the scale, so that they compute what they did. Paths that the
    tree does not have (a bias that a model does without) are passed over.

    Args:
      params: the tree, with QTensors.
      pairs: the model's.

    Returns:
      The tree, in which the readers of all pairs have no channel scale. Other leaves keep theirs.

    Raises:
      ValueError: readers of one input have different scales, or a source cannot be divided.
    """
    leaves = dict(named_leaves(params, is_qtensor))
    for pair in pairs:
        leaves |= _folded(pair, leaves)
    structure = jax.tree.structure(params, is_leaf=is_qtensor)
    return jax.tree.unflatten(structure, list(leaves.values()))


def unfolded(params: Mapping[str, Any], original: Mapping[str, Any], pairs: Sequence[FoldPair]) -> dict[str, Any]:
    """Takes channel scales out of where `fold`, or another program, has moved them, so that weights can be compared.

    They show in the norms, which are kept in floating point, as what these were divided by. Where a norm was divided,
    linear layers may have been too: by what fits their columns best.

    Args:
      params: leaves by path, some of them folded.
      original: the same model before it was quantized, as floats.
      pairs: the model's. Those of which a source or all readers are missing are passed over.

    Returns:
      The leaves, where each QTensor has its channel scale, and the columns of its source are what they were.
    """
    leaves = dict(params)
    known = [(pair, next((s for s in pair.sources if s in params and s in original), None)) for pair in pairs]
    norms = [(pair, source) for pair, source in known if source is not None and not source.endswith("kernel")]
    if all(jnp.allclose(_divisor(params[s], original[s], p.offset, False), 1, rtol=1e-2) for p, s in norms):
        return leaves
    for pair, source in known:
        width = max(
            (original[path].shape[-2] for path in pair.readers if path in params and path in original), default=0
        )
        if source is None or not width:
            continue
        is_kernel = source.endswith("kernel")
        scale = _divisor(leaves[source], original[source], pair.offset, is_kernel)[..., -width:, None]
        if is_kernel:
            leaves[source] = _divided(source, leaves[source], 1 / scale)
        leaves |= {path: _with_scale(leaves[path], scale) for path in pair.readers if path in leaves}
    return leaves


def _divisor(source: Any, original: jax.Array, offset: float, is_kernel: bool) -> jax.Array:
    """What the channels of a source were divided by, `[*lead, channels]`."""
    own = dequantize(source) if is_qtensor(source) else source
    own, before = (a.astype(compute_dtype(a.dtype)) + offset for a in (own, original))
    if is_kernel:
        if is_qtensor(source) and source.channel_scale is not None:  # rows as they were rounded, all as finely
            own, before = (a * source.channel_scale.astype(a.dtype) for a in (own, before))
        own, before = jnp.sum(own * own, -2), jnp.sum(own * before, -2)
    ratio = before / own
    return jnp.where(jnp.isfinite(ratio) & (ratio > 0), ratio, 1)


def _with_scale(reader: Any, scale: jax.Array) -> Any:
    """A reader of inputs that have been divided by a scale, as one that divides them itself."""
    if not is_qtensor(reader):
        return (reader.astype(scale.dtype) / _spread(scale, reader.ndim)).astype(reader.dtype)
    scale = jnp.broadcast_to(_spread(scale, reader.scale.ndim), (*reader.scale.shape[:-2], *scale.shape[-2:]))
    if reader.channel_scale is not None:
        scale = scale * reader.channel_scale
    return dataclasses.replace(reader, channel_scale=scale.astype(reader.scale.dtype))


def _folded(pair: FoldPair, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that a pair changes."""
    readers = {path: leaves[path] for path in pair.readers if path in leaves}
    lead = min((np.ndim(leaf) - 2 for leaf in readers.values()), default=0)
    scales = {path: q.channel_scale for path, q in readers.items() if is_qtensor(q)}
    scaled = {path: _of_all(path, scale, lead) for path, scale in scales.items() if scale is not None}
    if not scaled:
        return {}
    first, scale = next(iter(scaled.items()))
    for path in scales:
        if path not in scaled or not jnp.array_equal(scaled[path], scale):
            raise ValueError(
                f"'{path}' and '{first}' read the same input, but have different channel scales; quantize them by the "
                "same config, or leave one of them as it is"
            )
    sources = {path: leaves[path] for path in pair.sources if path in leaves}
    if pair.offset:
        lift = functools.reduce(jnp.maximum, [_lift(source, scale, pair.offset) for source in sources.values()])
        readers = {path: _divided_by(leaf, lift) for path, leaf in readers.items()}
        scale = scale / lift
    found = {path: _without_scale(leaf, scale) for path, leaf in readers.items()}
    return found | {path: _divided(path, leaf, scale, pair.offset) for path, leaf in sources.items()}


def _of_all(path: str, scale: jax.Array, lead: int) -> jax.Array:
    """The scales `[*lead, K, 1]` of a reader, of which several (experts) may have the same input."""
    while scale.ndim - 2 > lead:
        if not jnp.array_equal(scale, jnp.broadcast_to(scale[..., :1, :, :], scale.shape)):
            raise ValueError(
                f"the matrices of '{path}' read the same input, but have different channel scales; quantize it by "
                "model.recipe(config, foldable=True), or by a config without channel scales"
            )
        scale = scale[..., 0, :, :]
    return scale


def _lift(source: jax.Array, scale: jax.Array, offset: float) -> jax.Array:
    """Powers of two `[*lead, 1, 1]` that lift a source, offset included, to half of its offset or more.

    Less, and the difference that is stored would lose its digits in a short dtype. Nothing is lifted more than 256-fold
    for a channel that is almost dead.
    """
    smallest = jnp.min(jnp.abs(source.astype(scale.dtype) + offset) / scale[..., 0], axis=-1) / offset
    power = jnp.clip(jnp.ceil(-1 - jnp.log2(smallest)), 0, 8).astype(jnp.int32)
    return jnp.ldexp(jnp.ones((), scale.dtype), power)[..., None, None]


def _divided_by(reader: Any, lift: jax.Array) -> Any:
    """A quantized reader of an input that is larger by a power of two; those that are not follow by their scale."""
    if not is_qtensor(reader):
        return reader

    def times(a: jax.Array | None, factor: jax.Array) -> jax.Array | None:
        return None if a is None else a * _spread(factor, a.ndim).astype(a.dtype)

    return dataclasses.replace(
        reader,
        scale=times(reader.scale, 1 / lift),
        input_scale=times(reader.input_scale, lift),
        outlier_weight=times(reader.outlier_weight, 1 / lift),
    )


def _without_scale(reader: Any, scale: jax.Array) -> Any:
    if is_qtensor(reader):
        return dataclasses.replace(reader, channel_scale=None)
    wide = compute_dtype(reader.dtype)
    return (reader.astype(wide) * _spread(scale, reader.ndim).astype(wide)).astype(reader.dtype)


def _spread(a: jax.Array, ndim: int) -> jax.Array:
    """`[*lead, ·, ·]` with axes of one behind the leading ones, for matrices of which several have the same input."""
    return a.reshape(*a.shape[:-2], *(1,) * (ndim - a.ndim), *a.shape[-2:])


def _divided(path: str, source: Any, scale: jax.Array, offset: float = 0.0) -> Any:
    """A source `[*lead, ..., channels]` divided by scales `[*lead, channels, 1]`."""
    if isinstance(source, QTensor):
        if source.spec.granularity == "per_tensor" or len(source.out) != 1:
            raise ValueError(
                f"'{path}' has one scale for all of its outputs, so no channel scale can be folded into it; quantize "
                "it per_channel or per_group"
            )
        return dataclasses.replace(source, scale=_divided(path, source.scale, scale))
    scale = scale[..., 0]
    before = source.shape[-1] - scale.shape[-1]
    scale = jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(before, 0)], constant_values=1)
    scale = scale.reshape(*scale.shape[:-1], *(1,) * (source.ndim - scale.ndim), scale.shape[-1])
    wide = compute_dtype(source.dtype)
    return ((source.astype(wide) + offset) / scale.astype(wide) - offset).astype(source.dtype)
