"""Quantizes a model's weights as they are read, one layer after the other: the floats of all are never in memory."""

import re
from collections.abc import Iterator
from typing import Any, Protocol

from jaxquant.models.model import Model
from jaxquant.models.names import parameter_shapes
from jaxquant.models.stacking import unstack_layers
from jaxquant.transforms.quantize import weights_by_name
from jaxquant.transforms.recipe import name_of, needs_statistics, resolve, rules_of
from jaxquant.transforms.stream import quantize_blocks, stack_blocks


class Source(Protocol):
    """A model whose parameters are read when they are asked for; `pretrained.Checkpoint` says more."""

    @property
    def model(self) -> Model:
        """The model."""

    def outer(self) -> dict[str, Any]:
        """The parameters outside of the layers."""

    def layers(self, layers: range) -> dict[str, Any]:
        """The parameters of some layers, as `{"layers": ...}`, stacked."""


def quantized_params(source: Source, recipe: Any, stacked: bool) -> dict[str, Any]:
    """The parameters of a float model, quantized by methods that need no statistics.

    Args:
      source: the model.
      recipe: as for `quantize_params`; a bare config is for what `Model.recipe` gives it to.
      stacked: whether the layers are stacked in the result.

    Raises:
      ValueError: as `quantize_params`, or a method needs statistics.
    """
    taken = _taken(source.model, recipe, stacked)
    outer = _quantized(source.model, source.outer(), {p: c for p, c in taken.items() if not p.startswith("layers/")})
    inner, count = {p: c for p, c in taken.items() if p.startswith("layers/")}, source.model.config.num_layers
    if stacked and not inner:
        return outer | source.layers(range(count))
    if stacked:
        one_by_one = (source.layers(range(i, i + 1)) for i in range(count))
        return outer | stack_blocks(list(_blocks(source.model, one_by_one, inner, count)))[0]
    apart: dict[str, Any] = {}
    for i in range(count):
        layer = {str(i): unstack_layers(source.layers(range(i, i + 1)))["layers"]["0"]}
        own = {path: config for path, config in inner.items() if path.startswith(f"layers/{i}/")}
        apart |= _quantized(source.model, {"layers": layer}, own)["layers"]
    return outer | {"layers": apart}


def _taken(model: Model, recipe: Any, stacked: bool) -> dict[str, Any]:
    """The config of each parameter that the recipe takes."""
    rules = rules_of(recipe)
    for _, config in rules:
        if config is not None and (needs_statistics(config) or hasattr(config, "configs")):
            raise ValueError(
                f"quantize={name_of(config)}: it needs calibration statistics, and a model that is only read has none; "
                "load it, and use jq.calibrate and jq.quantize_params, or give jq.RTN"
            )
    if rules is not recipe:
        rules = model.recipe(recipe)
    shapes = parameter_shapes(model.config, stacked)
    matrices = weights_by_name([path for path, shape in shapes.items() if len(shape) > 1], rules)
    taken = resolve(rules, shapes, matrices)
    if not taken:
        raise ValueError("the recipe quantizes nothing: every rule that matches has None for its config")
    return taken


def _quantized(model: Model, params: dict[str, Any], taken: dict[str, Any]) -> dict[str, Any]:
    return next(_blocks(model, iter([params]), taken, 1))[0] if taken else params


def _blocks(model: Model, blocks: Iterator[Any], taken: dict[str, Any], count: int) -> Iterator[tuple[Any, Any]]:
    rules = [(re.escape(path), config) for path, config in taken.items()]
    return quantize_blocks(model.blocks.apply, blocks, None, rules, count=count)
