"""Optimizers of parameters and learned ranges, each with its own learning rate."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import optax

from jaxquant.transforms.tracing.interpreter import path_name

Rate: TypeAlias = float | Callable[[Any], Any] | optax.GradientTransformation | None


def qat_optimizer(
    optimizer: optax.GradientTransformation, *, ranges: Rate = None, rules: Sequence[tuple[str, Rate]] = ()
) -> optax.GradientTransformation:
    """An optimizer of `{"params": parameters, "ranges": QATState.ranges}`.

    Learned ranges are updated by Adam without weight decay: a scale that is pulled towards zero loses codes.

    Args:
      optimizer: of the parameters, with its weight decay if it has any.
      ranges: the learning rate of learned ranges (a number or an optax schedule), or an optimizer for them. LSQ scales
        their gradients for SGD at the rate of the weights. To Adam the size of a gradient means nothing, and a scale
        moves all weights that share it, the largest by as many steps as it has codes: where a training begins with
        good scales (`start_from`), take a hundredth of the weights' rate.
      rules: pairs (pattern, rate) for parameters and ranges whose whole path matches, such as
        `("params/embed_tokens/.*", None)`; the first that matches wins. None keeps them as they are.

    Returns:
      An optax transformation; its state is a pytree. `init` and `update` raise ValueError if there are ranges and no
      rate, a rate and no ranges, or a rule that matches no parameter.

    Raises:
      ValueError: a pattern is no regular expression.
    """
    for pattern, _ in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rule {pattern!r} is no regular expression: {error}") from None
    parts = {"params": optimizer, "ranges": _adam(ranges)} | {
        f"rule {i}": _adam(rate) for i, (_, rate) in enumerate(rules)
    }

    def labels(tree: Any) -> Any:
        flat, structure = jax.tree_util.tree_flatten_with_path(tree)
        paths = [path_name(key) for key, _ in flat]
        found = [_label(path, rules) for path in paths]
        _check(paths, found, ranges, rules)
        return jax.tree.unflatten(structure, found)

    return optax.partition(parts, labels)


def _adam(rate: Rate) -> optax.GradientTransformation:
    if rate is None:
        return optax.set_to_zero()
    return rate if isinstance(rate, optax.GradientTransformation) else optax.adam(rate)


def _label(path: str, rules: Sequence[tuple[str, Rate]]) -> str:
    for i, (pattern, _) in enumerate(rules):
        if re.fullmatch(pattern, path):
            return f"rule {i}"
    return path.split("/")[0]


def _check(paths: list[str], labels: list[str], ranges: Rate, rules: Sequence[tuple[str, Rate]]) -> None:
    unknown = next(
        (label for label in labels if label not in ("params", "ranges") and not label.startswith("rule ")), None
    )
    if unknown is not None:
        raise ValueError(f'the tree to train has {unknown!r} at its top; it should be {{"params": ..., "ranges": ...}}')
    some = ", ".join(paths[:4])
    for i, (pattern, rate) in enumerate(rules):
        if f"rule {i}" not in labels:
            raise ValueError(f"rule ({pattern!r}, {rate}) matches no parameter; there are {some}, …")
    if ranges is not None and not any(path.startswith("ranges/") for path in paths):
        raise ValueError(f"ranges={ranges} is the learning rate of learned ranges, of which there are none; use jq.LSQ")
    if ranges is None and "ranges" in labels:
        raise ValueError(
            "there are learned ranges without a learning rate; give one, as qat_optimizer(..., ranges=1e-3)"
        )
