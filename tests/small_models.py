"""Small decoders with parameters that nothing had to be compiled for."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import jaxquant as jq
from jaxquant.models.names import parameter_shapes
from jaxquant.numerics.packing import packed_size
from jaxquant.numerics.qtensor import is_packed, is_qtensor

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


OPT = {
    **{key: CONFIG[key] for key in CONFIG if key not in ("intermediate_size", "num_key_value_heads")},
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "ffn_dim": 96,
}


def is_layer_kernel(path):
    return path.startswith("layers/") and path.endswith("kernel") and "mlp/gate/" not in path  # a router


def random_model(spec=None, only=is_layer_kernel, config=CONFIG, **changes):
    """A model, and its stacked parameters, of which those that `only` names are quantized to `spec`."""
    model = jq.Model.from_hf({**config, **changes})
    shapes = parameter_shapes(model.config)
    params = {path: random_array(shape, changes.get("dtype", "float32"), i) for i, (path, shape) in
              enumerate(sorted(shapes.items()))}  # fmt: skip
    params = traverse_util.unflatten_dict(params, sep="/")
    return model, params if spec is None else quantized(params, spec, only)


def random_array(shape, dtype="float32", seed=0):
    scale = 0.5 / math.sqrt(shape[-2]) if len(shape) > 1 else 1
    return jnp.asarray(np.random.default_rng(seed).normal(1 if len(shape) == 1 else 0, scale, shape), dtype)


def quantized(params, spec, only=is_layer_kernel):
    """The parameters with random codes in place of those that `only` names."""
    flat = traverse_util.flatten_dict(params, sep="/")
    flat = {path: random_qtensor(leaf.shape, spec, leaf.dtype.name, i) if only(path) else leaf
            for i, (path, leaf) in enumerate(flat.items())}  # fmt: skip
    return traverse_util.unflatten_dict(flat, sep="/")


def random_qtensor(shape, spec, dtype="float32", seed=0):
    """A QTensor `[*lead, K, N]` of random codes and zero points, and scales that every float dtype has."""
    rng, (*lead, k, n), bits = np.random.default_rng(seed), shape, spec.bits
    if is_packed(spec):
        values = rng.integers(0, 256, (*lead, packed_size(k, bits), n)).astype(np.uint8)
    else:
        values = rng.integers(spec.min_code, spec.max_code + 1, (*lead, k, n)).astype(np.int8)
    sizes = (*lead, spec.num_groups(k), 1 if spec.granularity == "per_tensor" else n)
    scale = rng.integers(128, 256, sizes) * 2.0 ** -rng.integers(11, 15, sizes)
    zero = rng.integers(spec.min_code, spec.max_code + 1, sizes).astype(np.int8)
    scale = jnp.asarray(scale, spec.scale_dtype or dtype)
    zero = None if spec.symmetric else jnp.asarray(zero)
    q = jq.QTensor(jnp.asarray(values), scale, zero, spec, dtype, (-2,), (-1,), (k,))
    if spec.activations is None or spec.activations.outlier_threshold is None:
        return q
    index, rows = jnp.zeros((*lead, 0, 1), jnp.int32), jnp.zeros((*lead, 0, n), dtype)
    return dataclasses.replace(q, outlier_index=index, outlier_weight=rows)


def in_order_of_groups(q, seed=0):
    """A weight as act-order makes it: the same codes, but each group has inputs from everywhere, ascending."""
    if not is_qtensor(q):
        return q
    rng, (*lead, k, _) = np.random.default_rng(seed), q.shape
    order = rng.permuted(np.broadcast_to(np.arange(k, dtype=np.int32), (*lead, k)), axis=-1)
    order = np.sort(order.reshape(*lead, -1, q.spec.group_size)).reshape(*lead, k, 1)
    return dataclasses.replace(q, input_order=jnp.asarray(order))
