"""Checkpoints for the report: run if they can be, else read as far as they go."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxquant.inspection import kind_of
from jaxquant.models.model import Model
from jaxquant.models.names import tensor_paths
from jaxquant.models.stacking import layer_of
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.opening import Checkpoint, find_model, open_incomplete
from jaxquant.pretrained import load_pretrained

ROUTER = "layers/mlp/gate/kernel"  # of experts, which stays as it is


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of the report.

    Attributes:
      name: as the user gave it.
      model: what it computes, in float32; None where not even its configuration can be read.
      params: all of its parameters; None where they do not make up the model, and it cannot be run.
      parts: what can be read of it then.
      problem: why it cannot be run; None where it can.
    """

    name: str
    model: Model | None
    params: Any
    parts: Checkpoint | None
    problem: str | None

    @property
    def num_layers(self) -> int:
        """Layers of the model, whether they are there or not."""
        return 0 if self.model is None else self.model.config.num_layers

    @property
    def weights(self) -> dict[str, None]:
        """The short names of its linear layers, in the order of its family."""
        paths = () if self.model is None else tensor_paths(self.model.config).values()
        return dict.fromkeys(short_name(path) for path in paths if path.startswith("layers/") and is_linear(path))

    def layer(self, layer: int) -> dict[str, Any]:
        """What there is of a layer's parameters, by their path in a stack; nothing where it cannot be read."""
        if self.parts is None:
            return {} if self.params is None else layer_of(self.params, layer)
        try:
            return self.parts.present(layer)
        except (ValueError, OSError):  # `problem` says what is wrong with the checkpoint
            return {}


def open_checkpoint(name: str) -> Opened:
    """Opens a checkpoint for the report.

    Raises:
      FileNotFoundError: there is none of that name. What is wrong with one that exists is its `problem`.
    """
    directory = find_model(name)
    try:
        return Opened(name, *load_pretrained(directory, dtype="float32"), None, None)
    except (ValueError, OSError) as error:
        problem = _one_line(error)
    try:
        parts = open_incomplete(directory)
    except (ValueError, OSError):
        return Opened(name, None, None, None, problem)
    return Opened(name, parts.model, None, parts, problem)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def linear(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a layer's linear layers, among its parameters."""
    return {path: leaf for path, leaf in layer.items() if is_linear(path)}


def is_linear(path: str) -> bool:
    """Whether a parameter of a layer is the weight of a linear layer."""
    return path.endswith("/kernel") and path != ROUTER


def short_name(path: str) -> str:
    """The name of a linear layer for people: "mlp/up_proj" for "layers/mlp/up_proj/kernel"."""
    return path.removeprefix("layers/").removesuffix("/kernel")


class Storage(NamedTuple):
    """How the linear layers of a checkpoint are stored.

    Attributes:
      kind: for people, "4 bits, groups of 128, symmetric".
      bits_per_weight: in memory, scales and all else that belongs to them included; None where there is none.
      missing: layers without any.
    """

    kind: str
    bits_per_weight: float | None
    missing: tuple[int, ...]


class Tally:
    """Counts the linear layers of a checkpoint as they are read."""

    def __init__(self) -> None:
        self._kinds = Counter[str]()
        self._nbytes = self._size = 0
        self._missing: list[int] = []

    def add(self, layer: int, weights: Mapping[str, Any]) -> None:
        """Counts those of one layer."""
        for leaf in weights.values():
            self._kinds[kind_of(leaf)] += 1
            self._nbytes, self._size = self._nbytes + leaf.nbytes, self._size + leaf.size
        if not weights:
            self._missing.append(layer)

    @property
    def storage(self) -> Storage:
        """What was counted."""
        kinds = [kind for kind, _ in self._kinds.most_common()]
        others = f", and {len(kinds) - 1} other ways" if len(kinds) > 1 else ""
        bits = 8 * self._nbytes / self._size if self._size else None
        return Storage("".join(kinds[:1]) + others, bits, tuple(self._missing))


def num_weights(params: Any) -> int:
    """Parameters, a QTensor counting as many as it stands for."""
    return sum(leaf.size for leaf in jax.tree.leaves(params, is_leaf=is_qtensor))
