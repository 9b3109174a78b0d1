"""What a training with rounded numbers keeps beside the parameters: learned ranges, seen ranges, the step."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from jaxquant.transforms.training.taken import Taken


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "ranges", "observed"],
    meta_fields=["weights", "settled"],
)
@dataclasses.dataclass(frozen=True)
class QATState:
    """A pytree; with the parameters and the state of the optimizer it is all that a training needs to go on.

    Attributes:
      step: int32 `[]`, how many steps of training it has seen.
      ranges: what is learned, a dict nested as the parameters are, with the weight's own name last. Under it are
        `scale` and, if asymmetric, `zero_point`, float `[*lead, groups, *out]`, and for static inputs `input_scale`
        and `input_zero_point`, float `[*lead]`. Train them as other parameters.
      observed: ranges of static inputs that are not learned, nested alike: `lowest`, `highest` and `seen` (rows in all,
        0 before the first), float `[*lead]`.
      weights: what is rounded, and how.
      settled: the step from which on the schedule changes nothing.
    """

    step: jax.Array
    ranges: dict[str, Any]
    observed: dict[str, Any]
    weights: tuple[Taken, ...]
    settled: int


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": x}` -> `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, value in named.items():
        *parts, name = path.split("/")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[name] = value
    return tree


def at(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What `nested` has put at a path; empty if that is nothing."""
    node: Any = tree
    for part in path.split("/"):
        node = node.get(part, {})
    return node
