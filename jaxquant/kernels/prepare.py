"""Re-lays quantized weights once, so that the kernels of a platform read them as they need them."""

import functools
import math
import os
from typing import Any

import jax

from jaxquant.kernels.tuned import read_tiles, with_tiles
from jaxquant.numerics.prepared import Platform, Prepared
from jaxquant.numerics.qtensor import QTensor, is_qtensor


def prepare(
    params: Any, platform: Platform | None, chip: str | None = None, *, tiles: str | os.PathLike | None = None
) -> Any:
    """Re-lays the quantized weights of a parameter tree for the kernels of a platform.

    The layout selects the kernels: a program with weights prepared for a TPU can be lowered for it on any machine.
    Everything that takes plain weights takes prepared ones, and on any platform; only speed and memory differ. What
    `save` writes is the same for both.

    Args:
      params: any pytree of arrays and QTensors; also a QTensor.
      platform: "cpu", "gpu" or "tpu"; None undoes it.
      chip: "v4", "v5e", "v5p", "v6e" or "tpu7x" of the TPUs, "h100" or "h200" of the GPUs. None is for all of them.
      tiles: a file of `jaxquant tune` for the chip: kernels are cut as was quickest for the shapes that it has, and as
        their tables say for others. None is the tables.

    Returns:
      The tree, whose QTensors have the same codes and scales. Weights of 4 bits and less stay as they are where their
      number of inputs is odd (GPU), or no multiple of 32 (CPU).

    Raises:
      ValueError: there is no such platform or chip, or the file is none for it.
      OSError: the file cannot be read.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> q = jq.quantize(jnp.linspace(-1, 1, 128).reshape(64, 2), jq.int4(group_size=32))
      >>> bool((jq.prepare(q, "tpu").codes == q.codes).all())
      True
    """
    target = None if platform is None else Prepared(platform, chip)
    tuned = None if tiles is None else read_tiles(tiles)
    if tuned is not None and tuned.chip != chip:
        raise ValueError(f"tiles={str(tiles)!r} are for chip={tuned.chip!r}, not {chip!r}; tune on that")

    def one(leaf):
        if not is_qtensor(leaf):
            return leaf
        q = _prepared(leaf, target)
        return q if tuned is None or q.prepared is None else with_tiles(q, tuned.of(q))

    return jax.tree.map(one, params, is_leaf=is_qtensor)


@functools.partial(jax.jit, static_argnums=1)
def _prepared(q: QTensor, target: Prepared | None) -> QTensor:
    return q.laid_out(None if target and math.prod(q.in_shape) % target.run(q.spec.bits) else target)
