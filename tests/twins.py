"""A model with outliers, equivalent to the packaged one."""

import jax
import jax.numpy as jnp
import numpy as np

CHANNELS, FACTORS = 4, (30, 60)


def outlier_twin(params):
    """The same function: a few channels of each norm in the layers are 30 to 60 times as large, and the rows of the
    linear layers that read them are as much smaller."""
    rng = np.random.default_rng(0)
    layers = jax.tree.map(lambda a: a.astype(jnp.float32), params["layers"])
    count, hidden = layers["input_layernorm"]["scale"].shape
    for norm, module, names in (
        ("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj")),
        ("post_attention_layernorm", "mlp", ("gate_proj", "up_proj")),
    ):
        factor = np.ones((count, hidden), np.float32)
        for row in factor:
            row[rng.choice(hidden, CHANNELS, replace=False)] = rng.uniform(*FACTORS, CHANNELS)
        layers[norm]["scale"] = layers[norm]["scale"] * jnp.asarray(factor)
        for name in names:
            kernel = layers[module][name]
            layers[module][name] = {**kernel, "kernel": kernel["kernel"] / jnp.asarray(factor)[..., None]}
    return {**params, "layers": layers}
