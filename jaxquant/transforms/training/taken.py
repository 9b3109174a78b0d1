"""Which weights of a model function are trained with rounded numbers, and the roles of their axes."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.methods.lsq import LSQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import QuantSpec
from jaxquant.transforms.recipe import name_of, resolve
from jaxquant.transforms.tracing import interpreter
from jaxquant.transforms.tracing.assemble import used_axes
from jaxquant.transforms.tracing.rounder import users


@dataclasses.dataclass(frozen=True)
class Taken:
    """A weight that a recipe takes; static.

    Attributes:
      path: in the parameter tree.
      config: `RTN` or `LSQ`.
      shape, dtype: of the weight.
      contract, out: its axes' roles, negative and ascending.
      multiplied: whether products consume it; rows of an embedding are only looked up.
    """

    path: str
    config: Any
    shape: tuple[int, ...]
    dtype: str
    contract: tuple[int, ...]
    out: tuple[int, ...]
    multiplied: bool

    @property
    def spec(self) -> QuantSpec:
        """Its codes, and those of its inputs if it has any."""
        return self.config.spec if self.multiplied else dataclasses.replace(self.config.spec, activations=None)

    @property
    def scale_dtype(self) -> np.dtype:
        """Of its scales, as a QTensor keeps them."""
        return jnp.dtype(self.spec.scale_dtype or self.dtype)

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes that stack matrices, ascending from 0."""
        named = self.contract + self.out
        return tuple(a for a in range(len(self.shape)) if a - len(self.shape) not in named)

    @property
    def lead_shape(self) -> tuple[int, ...]:
        """Their sizes."""
        return tuple(self.shape[a] for a in self.lead)

    @property
    def channels(self) -> int:
        """Inputs of a matrix."""
        return math.prod(self.in_shape)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The sizes of the axes that products contract."""
        return tuple(self.shape[a] for a in self.contract)

    @property
    def learned(self) -> bool:
        """Whether its ranges are parameters."""
        return isinstance(self.config, LSQ)


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced model function, and what a recipe takes of it.

    Attributes:
      closed, structure, leaves, arrays: as `interpreter.trace` returns them.
      weights: what is taken.
    """

    closed: Any
    structure: Any
    leaves: list
    arrays: list
    weights: tuple[Taken, ...]


def trace(fn, params: Any, inputs: tuple, recipe: Any) -> Program:
    """Traces `fn(params, *inputs)` and finds the weights that a recipe takes.

    Raises:
      ValueError: a rule takes nothing, no weight is taken, or a config cannot be trained.
      TypeError: a weight that is taken is used in a way that is no product, lookup or renaming.
    """
    closed, structure, leaves, arrays = interpreter.trace(fn, params, inputs)
    own = dict(interpreter.named_leaves(params, is_qtensor))  # without the parts of what is quantized already
    matrices = {path for path, leaf in leaves if path in own and interpreter.is_matrix(leaf)}
    recorder, seen = users(closed, leaves, arrays, lambda path, _: path in matrices)
    shapes = {path: np.shape(leaf) for path, leaf in leaves}
    products, _ = used_axes(recorder.uses, shapes)
    quantizable = set(products) | (seen.lookups & matrices if isinstance(recipe, list | tuple) else set())
    found = resolve(recipe, own, quantizable)
    if not found:
        raise ValueError("the recipe quantizes nothing: every rule that matches has None for its config")
    notes = dict(seen.notes)
    for path in found:
        if path in notes:
            raise TypeError(
                f"the weight '{path}' cannot be trained with rounded numbers: {notes[path]}. Leave it out by a rule "
                f"({path!r}, None) in front"
            )
    weights = [_taken(path, config, own[path], products.get(path)) for path, config in found.items()]
    return Program(closed, structure, leaves, arrays, tuple(weights))


def _taken(path: str, config: Any, leaf, product) -> Taken:
    _check(path, config)
    ndim = np.ndim(leaf)
    axes = (ndim - 1,), tuple(range(ndim - 1))  # of rows that are looked up
    contract, out = (tuple(a - ndim for a in axes) for axes in (axes if product is None else product[:2]))
    taken = Taken(path, config, np.shape(leaf), jnp.dtype(leaf.dtype).name, contract, out, product is not None)
    try:
        config.spec.num_groups(taken.channels)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None
    return taken


def _check(path: str, config: Any) -> None:
    if not isinstance(config, RTN | LSQ) or getattr(config, "clip", None) is not None:
        clip = " with a clip" if isinstance(config, RTN) else ""
        raise ValueError(
            f"'{path}': {name_of(config)}{clip} rounds with statistics of the inputs, which change in training; give "
            "jq.RTN(spec), or jq.LSQ(spec) for learned ranges"
        )
    activations = config.spec.activations
    if activations is not None and activations.outlier_threshold is not None:
        raise ValueError(f"'{path}': outliers are not told apart in training; leave out outlier_threshold")
    if activations is not None and activations.range != "absmax":
        raise ValueError(
            f"'{path}': range={activations.range!r} is chosen from a sample of calibration inputs; in training a "
            "static range follows the extremes (range='absmax') or is learned (jq.LSQ)"
        )
