"""`g_idx` of GPTQ and compressed-tensors: which group each input is in, where act-order mixes them.

The files have the codes in the order of the inputs, and `g_idx`, int32 `[K]`, the group of each. A QTensor has its
codes in the order of the groups, and `input_order` says whose they are.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxquant.numerics.qtensor import QTensor


def groups_of_inputs(q: QTensor) -> np.ndarray:
    """The `g_idx` of one matrix."""
    (k,) = q.in_shape
    index = np.arange(k, dtype=np.int32) // (q.spec.group_size or k)
    return index if q.input_order is None else index[_places(q)]


def in_order_of_inputs(q: QTensor) -> QTensor:
    """One matrix with its codes as files have them; scales and zero points stay those of the groups."""
    return q if q.input_order is None else dataclasses.replace(_rearranged(q, _places(q)), input_order=None)


def in_order_of_groups(q: QTensor, index: np.ndarray) -> QTensor:
    """The inverse of `in_order_of_inputs`, with the `g_idx` of the matrix."""
    order = np.argsort(index, kind="stable").astype(np.int32)
    return dataclasses.replace(_rearranged(q, order), input_order=jnp.asarray(order)[:, None])


def ascends(name: str, index: np.ndarray, groups: int) -> bool:
    """Whether groups follow one another in the order of the inputs.

    Args:
      name: of the array.
      index: a `g_idx`, not empty.
      groups: how many there are.

    Raises:
      ValueError: the groups are not all of one size, as others' readers and a QTensor expect them.
    """
    sizes = np.bincount(index, minlength=groups) if 0 <= index.min() <= index.max() < groups else np.zeros(1)
    if (sizes * groups != index.size).any():
        raise ValueError(f"{name} does not give each of {groups} groups as many inputs")
    return np.array_equal(index, np.arange(index.size) // (index.size // groups))


def _places(q: QTensor) -> np.ndarray:
    """Of each input, the row that has its codes."""
    return np.argsort(np.asarray(q.input_order)[:, 0])


def _rearranged(q: QTensor, rows: np.ndarray) -> QTensor:
    again = QTensor.from_codes(q.codes[rows], q.scale, q.zero_point, q.spec, dtype=q.dtype)
    return dataclasses.replace(q, values=again.values, prepared=None)
