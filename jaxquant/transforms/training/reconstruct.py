"""Learned rounding, block by block, after any method has chosen codes and scales.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent" (AutoRound, arXiv:2309.05516; original code:
intel/auto-round), which continues Nagel et al. 2020, "Up or Down?" (AdaRound, arXiv:2004.10568). With the codes c and
the scales s of a block's weights as they are given,

    ŵ = a·s · (clamp(round(c + v)) − z),    v in [−1, 1],  a in [½, 3/2]

v starts at what rounding has cut off (so that a code can go back to its weight's other neighbour), a at 1, and both
take steps of a fixed size against the sign of the gradient of ‖block(x̂; ŵ) − block(x; w)‖², which passes through
rounding as 1. The size of the steps falls linearly to zero. x̂ is what the quantized blocks before have made of the
inputs, x what the float ones have.

Two things differ from the paper. It starts from rounding to nearest; here the search starts from the codes of another
method, GPTQ for example, which it can only improve: a block whose error on inputs that it has not trained on does not
fall keeps what it had. And there is one factor a per scale in place of two, α and β, for both ends of a range.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.numerics.affine import code_limits, dequantize, per_code
from jaxquant.numerics.layout import from_canonical, to_canonical
from jaxquant.numerics.qtensor import QTensor, is_qtensor, more_than_codes
from jaxquant.numerics.spec import compute_dtype
from jaxquant.transforms.dequantize import dequantize_params
from jaxquant.transforms.tracing import compat
from jaxquant.transforms.tracing.interpreter import named_leaves

FARTHEST, NARROWEST, WIDEST = 1.0, 0.5, 1.5  # bounds of v and of a


class BlockError(NamedTuple):
    """Mean squared errors of a block's output on the batch that is held out, of codes as given and as learned."""

    before: float
    after: float


def reconstruct(
    fn: Callable[[Any, Any], Any],
    blocks: Sequence[Any],
    quantized_blocks: Sequence[Any],
    inputs: Any,
    *,
    steps: int = 200,
    rate: float = 5e-3,
) -> tuple[list[Any], list[BlockError]]:
    """Improves the codes and scales of blocks that run one after the other.

    Args:
      fn: `fn(params, x) -> x`, one block; it takes the block's parameters with dense arrays.
      blocks: the float parameters of each block, alike in structure and shapes.
      quantized_blocks: the same, with QTensors (of float inputs) in place of some, from `quantize_params`.
      inputs: the first block's inputs, float `[batches, ...]`; two batches or more, of which the last is held out.
      steps: per block; each takes one batch, in turns.
      rate: size of the first step, for v in codes and for a in shares of the scale.

    Returns:
      `(blocks, errors)`: the quantized blocks with learned codes and scales, and their errors.

    Raises:
      ValueError: no block, other numbers of blocks, one batch only, no step, a QTensor of another shape than its
        weight, or one with rounded inputs, outliers, channels in another order, adapters, or a layout of a platform's
        kernels.
    """
    if not blocks or len(blocks) != len(quantized_blocks):
        raise ValueError(
            f"{len(blocks)} blocks and {len(quantized_blocks)} quantized ones; give as many of both, and some"
        )
    if inputs.shape[0] < 2:
        raise ValueError(f"inputs{list(inputs.shape)} are one batch; give two or more, the last of which is held out")
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps={steps!r} must be a whole number, 1 or more")
    for params, q in zip(blocks, quantized_blocks, strict=True):
        _check(params, q)
    run = jax.jit(partial(_learn, fn, steps, rate), compiler_options=compat.COMPILER_OPTIONS)
    through = jax.jit(lambda params, x: lax.map(partial(fn, params), x))
    dense = jax.jit(dequantize_params)
    x, rounded, results, errors = inputs, inputs, [], []
    for params, q in zip(blocks, quantized_blocks, strict=True):
        target = through(params, x)
        found, before, after = run(params, q, rounded, target)
        better = bool(after < before)
        results.append(found if better else q)
        errors.append(BlockError(float(before), float(after)))
        x, rounded = target, through(dense(results[-1]), rounded)
    return results, errors


def _check(params: Any, quantized: Any) -> None:
    dense = dict(named_leaves(params))
    for path, q in named_leaves(quantized, is_qtensor):
        if not is_qtensor(q):
            continue
        if path not in dense or np.shape(dense[path]) != q.shape:
            there = "none" if path not in dense else list(np.shape(dense[path]))
            raise ValueError(f"'{path}' is quantized with shape {list(q.shape)}, and in float it is {there}")
        if q.spec.activations is not None:
            raise ValueError(f"'{path}' has rounded inputs; train it with fake_quantized and start_from")
        if found := [name for name in more_than_codes(q) if name != "channel_scale"]:
            raise ValueError(f"'{path}' has {', '.join(found)}; learn its rounding before that, from jq.GPTQ(spec)")


def _learn(fn: Callable, steps: int, rate: float, params: Any, q: Any, inputs: jax.Array, targets: Any):
    """Codes and scales learned for one block, and the errors on the last batch before and after."""
    dense, names = dict(named_leaves(params)), [path for path, a in named_leaves(q, is_qtensor) if is_qtensor(a)]
    given = dict(named_leaves(q, is_qtensor))
    structure = jax.tree.structure(params)
    start = {path: _start(dense[path], given[path]) for path in names}
    last = inputs.shape[0] - 1

    def error(weights: dict[str, jax.Array], i):
        at = partial(lax.dynamic_index_in_dim, index=i, keepdims=False)
        leaves = [weights.get(path, given[path]) for path in dense]
        result = fn(jax.tree.unflatten(structure, leaves), at(inputs))
        wide = compute_dtype(result.dtype)
        return jnp.mean(jnp.square(result.astype(wide) - at(targets).astype(wide)))

    def loss(learned, i):
        return error({path: _weight(given[path], *learned[path]) for path in names}, i)

    def step(learned, t):
        size = rate * (1 - t / steps)
        gradient = jax.grad(loss)(learned, t % last)
        return jax.tree.map(lambda a, g: a - size.astype(a.dtype) * jnp.sign(g), learned, gradient), None

    learned, _ = lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    found = {path: _quantized(given[path], *learned[path]) for path in names}
    before, after = (error({path: dequantize(tree[path]) for path in names}, last) for tree in (given, found))
    leaves = [found.get(path, leaf) for path, leaf in given.items()]
    return jax.tree.unflatten(jax.tree.structure(q, is_leaf=is_qtensor), leaves), before, after


def _start(w: jax.Array, q: QTensor) -> tuple[jax.Array, jax.Array]:
    """v, as the codes, and a, as the scales."""
    wide = compute_dtype(w.dtype)
    canonical = to_canonical(w, q.contract, q.out).astype(wide)
    if q.channel_scale is not None:
        canonical = canonical * q.channel_scale.astype(wide)
    codes = q.codes.astype(wide)
    scale, zero = _per_code(q, jnp.ones_like(q.scale, wide))
    return jnp.clip(canonical / scale + zero - codes, -0.49, 0.49), jnp.ones_like(q.scale, wide)


def _per_code(q: QTensor, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scales times a factor, as they will be stored, and zero points, per code."""
    scale = (q.scale.astype(factor.dtype) * jnp.clip(factor, NARROWEST, WIDEST)).astype(q.scale.dtype)
    zero = jnp.zeros_like(factor) if q.zero_point is None else q.zero_point.astype(factor.dtype)
    return per_code(scale.astype(factor.dtype), zero, q.codes.shape, len(q.out))


def _codes(q: QTensor, v: jax.Array) -> jax.Array:
    """The codes as floats, of the offsets; their derivative is 1 within the codes and half a step beyond."""
    low, high = code_limits(q.spec, v.dtype)
    moved = q.codes.astype(v.dtype) + jnp.clip(v, -FARTHEST, FARTHEST)
    passed = jnp.clip(moved, low - 0.5, high + 0.5)
    return lax.stop_gradient(jnp.clip(jnp.round(moved), low, high) - passed) + passed


def _weight(q: QTensor, v: jax.Array, factor: jax.Array) -> jax.Array:
    """The dense weight of the offsets and factors, with its own axes."""
    scale, zero = _per_code(q, factor)
    w = (_codes(q, v) - zero) * scale
    if q.channel_scale is not None:
        w = w / q.channel_scale.astype(w.dtype)
    return from_canonical(w, q.contract, q.out, q.in_shape).astype(q.dtype)


def _quantized(q: QTensor, v: jax.Array, factor: jax.Array) -> QTensor:
    """The QTensor of the offsets and factors."""
    codes = jnp.round(_codes(q, v)).astype(jnp.int8)
    scale = (q.scale.astype(factor.dtype) * jnp.clip(factor, NARROWEST, WIDEST)).astype(q.scale.dtype)
    axes = {"dtype": q.dtype, "contract": q.contract, "out": q.out, "in_shape": q.in_shape}
    new = QTensor.from_codes(codes, scale, q.zero_point, q.spec, **axes)
    return dataclasses.replace(new, channel_scale=q.channel_scale)
