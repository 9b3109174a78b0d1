"""Low-rank adapters of frozen quantized weights.

Hu et al. 2021 (arXiv:2106.09685), and Dettmers et al. 2023, "QLoRA" (arXiv:2305.14314): the codes stay as they are, and
a product W of rank r beside them is trained, W = α/r · A B. `quantized` then differentiates in A and B alone, without a
dense copy of any weight that it keeps.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.transforms.tracing.interpreter import named_leaves
from jaxquant.transforms.training.state import nested


def lora_init(
    key: jax.Array, qparams: Any, *, rank: int = 8, weights: str = ".*", dtype: Any = "float32"
) -> dict[str, Any]:
    """Adapters that change nothing yet: B is zero, and A is drawn evenly from ±1/√K, as PEFT does.

    Args:
      key: of `jax.random`.
      qparams: a tree with QTensors.
      rank: r.
      weights: a regular expression; QTensors whose whole path matches get adapters.
      dtype: of the adapters.

    Returns:
      A dict nested as the paths are, with `a`, `[*lead, K, r]`, and `b`, `[*lead, r, *out]`, per weight. Train it as
      any parameters.

    Raises:
      ValueError: no QTensor matches, or the rank is no positive whole number.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank={rank!r} must be a whole number, 1 or more")
    named = {path: q for path, q in named_leaves(qparams, is_qtensor) if is_qtensor(q)}
    taken = [path for path in named if re.fullmatch(weights, path)]
    if not taken:
        there = ", ".join(list(named)[:4]) or "none"
        raise ValueError(f"weights={weights!r} matches no quantized weight; there are: {there}")
    keys = jax.random.split(key, len(taken))
    return nested({path: _first(k, named[path], rank, jnp.dtype(dtype)) for k, path in zip(keys, taken, strict=True)})


def _first(key: jax.Array, q: QTensor, rank: int, dtype) -> dict[str, jax.Array]:
    lead, out = _outer(q)
    size = math.prod(q.in_shape)
    a = jax.random.uniform(key, (*lead, size, rank), dtype, -1, 1) * size**-0.5
    return {"a": a, "b": jnp.zeros((*lead, rank, *out), dtype)}


def _outer(q: QTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the leading and of the output axes."""
    out = tuple(q.shape[a] for a in q.out)
    return q.scale.shape[: q.scale.ndim - 1 - len(out)], out


def with_lora(qparams: Any, adapters: dict[str, Any], *, alpha: float | None = None) -> Any:
    """The tree whose QTensors have adapters; differentiable in these, under `jit` too.

    Args:
      qparams: the tree that `lora_init` was called with.
      adapters: from there.
      alpha: α; None is r, and leaves A B as it is.

    Returns:
      The tree, with A and α/r · B beside the codes of each QTensor that has an adapter.

    Raises:
      ValueError: there is no quantized weight where an adapter is, or it is no pair of A and B of that weight's shape.
    """
    named = dict(named_leaves(qparams, is_qtensor))
    found = {path.rpartition("/")[0] for path, _ in named_leaves(adapters)}
    for path in found:
        if not is_qtensor(named.get(path)):
            raise ValueError(f"the adapter '{path}' is of no quantized weight; there are: {', '.join(list(named)[:4])}")
    structure = jax.tree.structure(qparams, is_leaf=is_qtensor)
    leaves = [_joined(path, q, adapters, alpha) if path in found else q for path, q in named.items()]
    return jax.tree.unflatten(structure, leaves)


def _joined(path: str, q: QTensor, adapters: dict[str, Any], alpha: float | None) -> QTensor:
    for part in path.split("/"):
        adapters = adapters[part]
    if set(adapters) != {"a", "b"}:
        raise ValueError(f"the adapter '{path}' has {', '.join(adapters)}; expected a and b, as lora_init makes them")
    a, b = adapters["a"], adapters["b"]
    (lead, out), rank, size = _outer(q), a.shape[-1], math.prod(q.in_shape)
    if a.shape != (*lead, size, rank) or b.shape != (*lead, rank, *out):
        raise ValueError(
            f"the adapter '{path}' is a{list(a.shape)} b{list(b.shape)}; expected a{[*lead, size, rank]} "
            f"b{[*lead, rank, *out]}"
        )
    if alpha is not None:
        b = b * jnp.asarray(alpha / rank, b.dtype)
    return dataclasses.replace(q, adapter_in=a.reshape(*lead, size * rank, *(1,) * len(out)), adapter_out=b)
