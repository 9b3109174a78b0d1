"""From a tree with quantized weights back to one of arrays."""

from typing import Any

import jax

from jaxquant.numerics.affine import dequantize
from jaxquant.numerics.qtensor import is_qtensor


def dequantize_params(qparams: Any, dtype=None) -> Any:
    """The parameters with arrays in place of QTensors: what the model function itself takes.

    They have the size of the original parameters again, and hold no more than the codes do. Rounding of inputs, which
    belongs to a QTensor and to no array, is left out.

    Args:
      qparams: parameters as from `quantize_params` or `jq.load_pretrained`.
      dtype: of the arrays that take the place of QTensors; by default each has its QTensor's `dtype`. Other leaves
        stay as they are.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> params = {"w": jnp.array([[-7.0], [3.2]]), "b": jnp.array([0.5])}
      >>> qparams = params | {"w": jq.quantize(params["w"], jq.int4(narrow_range=True))}
      >>> jq.dequantize_params(qparams)["w"].tolist()
      [[-7.0], [3.0]]
    """
    return jax.tree.map(lambda a: dequantize(a, dtype) if is_qtensor(a) else a, qparams, is_leaf=is_qtensor)
