"""Learned rounding of a model with stacked layers, one layer after the other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq

ROWS = 4  # calibration samples per step


def learned(model, params: Any, qparams: Any, samples: np.ndarray, *, steps: int, rate: float) -> Any:
    """The quantized parameters with codes and scales that are learned on samples, from where they are."""

    def blocks(tree):
        count = len(model.blocks.windows)
        layers = [jax.tree.map(lambda a, i=i: a[i : i + 1], tree["layers"]) for i in range(count)]
        return [{"layers": own, "windows": model.blocks.windows[i : i + 1]} for i, own in enumerate(layers)]

    batches = jnp.asarray(samples).reshape(-1, ROWS, samples.shape[-1])
    inputs = jnp.stack([model.blocks.embed(params, batch) for batch in batches])
    found, errors = jq.reconstruct(model.blocks.apply, blocks(params), blocks(qparams), inputs, steps=steps, rate=rate)
    print("  errors of layers:", *(f"{e.before:.3g} -> {e.after:.3g}" for e in errors), flush=True)
    return {**qparams, "layers": jax.tree.map(lambda *a: jnp.concatenate(a), *(b["layers"] for b in found))}
