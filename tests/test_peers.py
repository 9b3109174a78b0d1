"""Checkpoints of other libraries, which the scripts in tests/peers have made, with the weights that those read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxquant as jq
from jaxquant.models.names import tensor_paths
from jaxquant.numerics.qtensor import is_qtensor

DATA = Path(__file__).with_name("data")


@pytest.mark.parametrize("name", [file.parent.name for file in sorted(DATA.glob("*/expected.safetensors"))])
def test_the_weights_are_those_that_the_writer_reads(name):
    model, params = jq.load_pretrained(DATA / name)
    expected = load_file(DATA / name / "expected.safetensors")
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
              for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)}  # fmt: skip
    weights = {path: jq.dequantize(leaf, jnp.float16) for path, leaf in leaves.items() if is_qtensor(leaf)}
    assert len(weights) == 7
    assert len(expected) == 7 * model.config.num_layers
    for tensor, theirs in expected.items():
        ours = weights[tensor_paths(model.config)[tensor]]
        np.testing.assert_array_equal(ours[int(tensor.split(".")[2])].T, theirs)


def test_the_orders_of_inputs_are_others_than_their_own():
    """Or the files would not show how they are read."""
    for name in ("compressed_tensors_group", "gptqmodel_act_order"):
        _, params = jq.load_pretrained(DATA / name)
        order = params["layers"]["mlp"]["up_proj"]["kernel"].input_order
        assert not np.array_equal(order[0, :, 0], np.arange(32))
