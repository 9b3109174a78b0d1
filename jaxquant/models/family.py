"""What sets one family of checkpoints apart: names and constants, never code."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class TensorName:
    """Where a parameter of the decoder lies in a Hugging Face checkpoint.

    `path` is the parameter's path ("layers/mlp/up_proj/kernel"), `name` the tensor's, with `{layer}` where the
    checkpoint has one tensor per layer. `transposed` marks kernels: `[in, out]` in Flax, `[out, in]` in the checkpoint.
    """

    path: str
    name: str
    transposed: bool

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading layer axis."""
        return "{layer}" in self.name


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    `tensors` lists every parameter but the output head, `head` the head of models that do not tie it to the embedding.
    Tensors whose name matches `ignored_tensors` (a regular expression) hold nothing that is learned. `fixed` are the
    configuration keys that would change the mathematics, with the one value that this decoder computes; `harmless` are
    the keys that do not matter to it.
    """

    architecture: str
    tensors: tuple[TensorName, ...]
    head: TensorName
    ignored_tensors: str
    fixed: Mapping[str, object]
    harmless: frozenset[str]
