"""Checkpoints of other libraries, which the scripts in tests/peers have made, with the weights that those read."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxquant as jq
from jaxquant.models.names import tensor_paths
from jaxquant.numerics.qtensor import is_qtensor

DATA = Path(__file__).with_name("data")


@pytest.mark.parametrize("name", ["compressed_tensors_group"])
def test_the_weights_are_those_that_the_writer_reads(name):
    model, params = jq.load_pretrained(DATA / name)
    expected = load_file(DATA / name / "expected.safetensors")
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
              for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor)}  # fmt: skip
    weights = {path: jq.dequantize(leaf) for path, leaf in leaves.items() if is_qtensor(leaf)}
    assert len(expected) == 2 * len(weights) == 14
    for tensor, theirs in expected.items():
        ours = weights[tensor_paths(model.config)[tensor]]
        np.testing.assert_array_equal(ours[int(tensor.split(".")[2])].T, theirs)
