"""What of a function's arguments is compiled in, and what is passed to the compiled program."""

import dataclasses
from typing import Any

import jax

from jaxquant.transforms.tracing.interpreter import traceable


@dataclasses.dataclass(frozen=True)
class Static:
    """What of a function's inputs is no array: their structure and the other leaves."""

    structure: Any
    leaves: tuple  # None where an array stands
    dynamic: tuple[int, ...]

    @classmethod
    def split(cls, inputs: tuple) -> tuple[list, "Static"]:
        """The arrays among the leaves of `inputs`, and the rest; raises TypeError if that cannot be hashed."""
        flat, structure = jax.tree.flatten(inputs)
        dynamic = tuple(i for i, leaf in enumerate(flat) if traceable(leaf))
        rest = tuple(None if i in dynamic else leaf for i, leaf in enumerate(flat))
        for leaf in rest:
            if not is_hashable(leaf):
                raise TypeError(f"input {leaf!r} is no array and not hashable; close over it, or make it a pytree")
        return [flat[i] for i in dynamic], cls(structure, rest, dynamic)

    def join(self, arrays: list) -> tuple:
        """The inputs that `split` took apart, with other arrays in their places."""
        full = list(self.leaves)
        for i, a in zip(self.dynamic, arrays, strict=True):
            full[i] = a
        return jax.tree.unflatten(self.structure, full)


def is_hashable(value: Any) -> bool:
    """Whether JAX can take a value as a static argument."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
