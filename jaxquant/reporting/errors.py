"""How far the linear layers of a model are from those of its baseline: at their outputs, or where these are not known,
in their weights."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.numerics.affine import dequantize
from jaxquant.numerics.output_error import energy, product
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.transforms.judge import weight_error


def relative_errors(
    weights: Mapping[str, Any], originals: Mapping[str, Any], inputs: Mapping[str, jax.Array]
) -> dict[str, float]:
    """The relative squared error of each weight of one layer.

    Args:
      weights: arrays or QTensors `[*experts, in, out]`, by path.
      originals: the baseline's, arrays of the same shapes.
      inputs: rows `[*experts, R, in]` of what the baseline multiplies each with.

    Returns:
      ‖x̂Ŵ - xW‖² / ‖xW‖² as in `LayerReport`, or ‖Ŵ - W‖² / ‖W‖² for weights without inputs. Experts are summed.
      Weights whose error is not defined or not finite are left out.
    """
    found = {}
    for path, leaf in weights.items():
        error, scale = (float(np.sum(part)) for part in _energies(originals[path], leaf, inputs.get(path)))
        if scale > 0 and np.isfinite(error / scale):
            found[path] = error / scale
    return found


@jax.jit
def _energies(w: jax.Array, leaf: Any, x: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The energies of the error and of what it is relative to, of each matrix."""
    if w.ndim > 2:
        return jax.vmap(_energies, in_axes=(0, 0, None if x is None else 0))(w, leaf, x)
    w = w.astype("float32")
    if x is None:
        own = dequantize(leaf) if is_qtensor(leaf) else leaf
        return energy(own.astype("float32") - w), energy(w)
    if is_qtensor(leaf):
        return weight_error(w, leaf, x), energy(product(x, w))
    return energy(product(x, leaf.astype("float32") - w)), energy(product(x, w))
