"""What `inspect` says of a checkpoint, against the files' own headers and counts made with plain NumPy."""

import functools
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import HF_CONFIG

import jaxquant as jq
from jaxquant.inspection import BINS, Histogram, inspect_checkpoint
from jaxquant.models import TINYLM
from jaxquant.numerics.qtensor import is_qtensor


def data_bytes(directory):
    """Bytes of the safetensors files behind their headers."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            total += file.stat().st_size - 8 - struct.unpack("<Q", opened.read(8))[0]
    return total


@functools.cache
def float_model(**changes):
    model = jq.Model.from_hf(HF_CONFIG | changes)
    return model, model.init(jax.random.key(0))


@functools.cache
def quantized_model(**changes):
    model, params = float_model(**changes)
    config = jq.RTN(jq.QuantSpec(bits=4, group_size=32, symmetric=False))
    return model, jq.quantize_params(params, None, model.recipe(config))[0]


@pytest.fixture(params=["tinylm", "float", "jaxquant", "compressed-tensors"])
def directory(request, tmp_path):
    if request.param == "tinylm":
        return TINYLM
    made = float_model() if request.param == "float" else quantized_model()
    jq.save(tmp_path / "m", *made, format="jaxquant" if request.param == "float" else request.param)
    return tmp_path / "m"


def test_totals_are_those_of_the_files_and_of_memory(directory):
    found = inspect_checkpoint(directory)
    _, params = jq.load_pretrained(directory)
    assert found.stored_nbytes == data_bytes(directory)
    assert found.left_aside_nbytes == 0
    assert found.nbytes == sum(a.nbytes for a in jax.tree.leaves(params))
    assert all(leaf.stored_nbytes > 0 for leaf in found.leaves)


def test_histograms_count_every_code_and_every_entry(directory):
    _, params = jq.load_pretrained(directory)
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    found = {leaf.path: leaf for leaf in inspect_checkpoint(directory).leaves}
    assert len(found) == len(leaves)
    for key, leaf in leaves:
        seen = found[jax.tree_util.keystr(key, simple=True, separator="/")]
        assert seen.shape == leaf.shape
        if is_qtensor(leaf):
            codes, counts = np.unique(np.asarray(leaf.codes), return_counts=True)
            assert seen.histogram.values == list(range(-8, 8))
            expected = dict(zip(codes.tolist(), counts.tolist(), strict=True))
            assert seen.histogram.counts == [expected.get(code, 0) for code in range(-8, 8)]
            assert (seen.bits, seen.group_size, seen.symmetric) == (4, 32, False)
        else:
            counts, edges = np.histogram(np.asarray(leaf, np.float64), BINS)
            assert seen.histogram == Histogram(edges.tolist(), counts.tolist())
            assert (seen.bits, seen.symmetric) == (8 * leaf.dtype.itemsize, None)


def test_all_parts_of_a_weight_count_whatever_they_are_called(tmp_path):
    """Tensors of one module are added up by its name alone."""
    jq.save(tmp_path / "m", *quantized_model(), format="compressed-tensors")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    module = "mlp.up_proj."
    expected = sum(array.nbytes for name, array in tensors.items() if module in name)
    parts = {name.rpartition(".")[2] for name in tensors if module in name}
    assert parts == {"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}
    found = {leaf.path: leaf.stored_nbytes for leaf in inspect_checkpoint(tmp_path / "m").leaves}
    assert found["layers/mlp/up_proj/kernel"] == expected


def test_biases_are_parameters_of_their_own(tmp_path):
    jq.save(tmp_path / "m", *quantized_model(attention_bias=True), format="compressed-tensors")
    found = {leaf.path: leaf.stored_nbytes for leaf in inspect_checkpoint(tmp_path / "m").leaves}
    assert found["layers/self_attn/q_proj/bias"] == 2 * 64 * 4


def test_tensors_that_are_not_loaded_are_told_apart(tmp_path):
    model, params = float_model(tie_word_embeddings=True)
    jq.save(tmp_path / "m", model, params)
    head = np.zeros((96, 64), np.float32)
    names = {"embed_tokens/embedding": "model.embed_tokens.weight", "norm/scale": "model.norm.weight"}
    tensors = {"lm_head.weight": head}
    for path, array in load_file(tmp_path / "m" / "model.safetensors").items():
        if path in names:
            tensors[names[path]] = array
            continue
        name = path.removeprefix("layers/").replace("/kernel", "/weight").replace("/scale", "/weight").replace("/", ".")
        for layer, matrix in enumerate(array):
            tensors[f"model.layers.{layer}.{name}"] = np.ascontiguousarray(matrix.T)
    (tmp_path / "m" / "jaxquant.json").unlink()
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    found = inspect_checkpoint(tmp_path / "m")
    assert found.left_aside_nbytes == head.nbytes
    assert found.stored_nbytes == data_bytes(tmp_path / "m")


def test_a_bare_tree_of_any_leaves(tmp_path):
    bad = jnp.asarray([1.0, np.nan, np.inf, 3.0, 3.0])
    tree = {
        "a/b": [jq.quantize(jnp.ones((6, 4)), jq.int8()), bad],
        "one": jnp.full((3,), 2.0, jnp.bfloat16),
        "none": jnp.full((2,), jnp.nan),
        "empty": jnp.zeros((0, 3)),
        "ids": jnp.arange(4),
        "__metadata__": jnp.zeros(2, jnp.float8_e4m3fn),
    }
    jq.save(tmp_path / "t", None, tree)
    found = inspect_checkpoint(tmp_path / "t")
    leaves = {leaf.path: leaf for leaf in found.leaves}
    assert found.stored_nbytes == found.nbytes == data_bytes(tmp_path / "t")
    assert found.left_aside_nbytes == 0
    assert leaves["a/b/0"].stored_nbytes == 24 + 4 * 4
    assert leaves["a/b/0"].histogram.counts == [0] * 255 + [24]
    assert (leaves["a/b/1"].nonfinite, sum(leaves["a/b/1"].histogram.counts)) == (2, 3)
    assert leaves["a/b/1"].histogram.values[::BINS] == [1.0, 3.0]
    assert sum(leaves["one"].histogram.counts) == 3
    assert (leaves["none"].nonfinite, leaves["none"].histogram) == (2, Histogram([], []))
    assert leaves["empty"].histogram == Histogram([], [])
    assert leaves["ids"].stored_as == "int32"
    json.dumps([leaf._asdict() for leaf in found.leaves], allow_nan=False)


def test_bars():
    assert Histogram(list(range(-2, 2)), [0, 1, 4, 8]).bars() == " ▁▄█"
    assert Histogram(list(range(-16, 16)), [0, 0, *[1, 2] * 15]).bars() == " " + "█" * 15
    assert Histogram([], []).bars() == ""
