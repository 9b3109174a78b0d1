"""Quantizes a model's weights as they are read, one layer after the other: the floats of all are never in memory."""

import re
from typing import Any

from jaxquant.models.model import Model
from jaxquant.models.names import parameter_shapes
from jaxquant.models.stacking import layer_path, stack_layers, unstack_layers
from jaxquant.opening import Checkpoint
from jaxquant.transforms.quantize import quantize_params, weights_by_name
from jaxquant.transforms.recipe import name_of, needs_statistics, resolve, rules_of


def quantized_params(source: Checkpoint, recipe: Any, stacked: bool) -> dict[str, Any]:
    """The parameters of a float model, quantized by methods that need no statistics.

    Args:
      source: the model.
      recipe: as for `quantize_params`; a bare config is for what `Model.recipe` gives it to.
      stacked: whether the layers are stacked in the result.

    Raises:
      ValueError: as `quantize_params`, or a method needs statistics.
    """
    taken, model = _taken(source.model, recipe, stacked), source.model
    outer = _quantized(source.outer(), {path: c for path, c in taken.items() if not path.startswith("layers/")})
    layers: dict[str, Any] = {}
    for i in range(model.config.num_layers):
        layer = {str(i): unstack_layers(source.layers(range(i, i + 1)))["layers"]["0"]}
        paths = {layer_path(path, i) if stacked else path: c for path, c in taken.items()}
        own = {path: config for path, config in paths.items() if path.startswith(f"layers/{i}/")}
        layers |= _quantized({"layers": layer}, own)["layers"]
    return stack_layers(outer | {"layers": layers}) if stacked else outer | {"layers": layers}


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


def _quantized(params: dict[str, Any], taken: dict[str, Any]) -> dict[str, Any]:
    rules = [(re.escape(path), config) for path, config in taken.items()]
    return quantize_params(params, None, rules)[0] if taken else params
