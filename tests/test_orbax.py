"""Trees saved by Orbax on some devices and restored on others."""

import json
import math
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from small_models import random_model, random_qtensor

import jaxquant as jq
from jaxquant import inspection
from jaxquant.checkpoints import orbax
from jaxquant.checkpoints.tensors import same_bits
from jaxquant.numerics.qtensor import is_qtensor

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
INT4 = jq.int4(group_size=16, symmetric=False)


def mesh(*sizes):
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, ("layers", "model")[-len(sizes) :])


def place(mesh):
    """The outputs of every kernel along the last axis of the mesh, layers along the first if it has two."""

    def sharding(path, array):
        if not path.startswith("layers/") or "kernel" not in path:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec("layers" if "layers" in mesh.axis_names else None, None, "model"))

    return sharding


def same_params(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(map(same_bits, *map(jax.tree.leaves, (a, b))))


def placed(params, sharding):
    def one(path, a):
        return jax.device_put(a, sharding(jax.tree_util.keystr(path, simple=True, separator="/"), a))

    return jax.tree_util.tree_map_with_path(one, params)


def test_saved_on_one_mesh_and_restored_on_others(tmp_path):
    model, params = random_model(INT4)
    jq.save(tmp_path / "out", model, placed(params, place(mesh(2, 4))), format="orbax")
    expected = model.apply(params, TOKENS)
    for other in (mesh(2, 2), mesh(1, 2), mesh(8)):
        again, read = jq.load_pretrained(tmp_path / "out", sharding=place(other))
        same_params(read, params)
        kernel = read["layers"]["mlp"]["up_proj"]["kernel"]
        for name in ("values", "scale", "zero_point"):
            array = getattr(kernel, name)
            assert array.sharding == place(other)(f"layers/mlp/up_proj/kernel/{name}", array)
        assert len(kernel.values.addressable_shards) == other.size
    np.testing.assert_allclose(again.apply(read, TOKENS), expected, atol=1e-5 * np.abs(expected).max())
    _, alone = jq.load_pretrained(tmp_path / "out")
    same_params(alone, params)
    assert {leaf.sharding for leaf in jax.tree.leaves(alone)} == {jax.sharding.SingleDeviceSharding(jax.devices()[0])}


def test_other_formats_are_placed_too(tmp_path):
    model, params = random_model(INT4)
    jq.save(tmp_path / "out", model, params)
    _, read = jq.load_pretrained(tmp_path / "out", sharding=place(mesh(8)))
    same_params(read, params)
    assert len(read["layers"]["mlp"]["up_proj"]["kernel"].values.addressable_shards) == 8
    same_params(jq.load(tmp_path / "out", sharding=place(mesh(8))), params)


def test_any_tree_comes_back(tmp_path):
    outliers = jq.int8(narrow_range=True, activations=jq.ActivationSpec(outlier_threshold=6.0))
    tree = {
        "a/b": [jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3).T, None],
        "a%2Fb": (np.array(True), jnp.float32(3)),
        "": {0: np.zeros((0, 3), np.float16), -1: jnp.ones((2, 2), jnp.float8_e4m3fn)},
        "q": random_qtensor((2, 64, 8), INT4),
        "llm.int8": random_qtensor((64, 8), outliers),  # whose outliers are arrays without an entry
        "x": np.array([1, 2], ml_dtypes.bfloat16),
    }
    jq.save(tmp_path / "out", None, tree, format="orbax")
    same_params(jq.load(tmp_path / "out"), tree)
    jq.save(tmp_path / "empty", None, {"nothing": ()}, format="orbax")
    assert jq.load(tmp_path / "empty") == {"nothing": ()}


def test_64_bit_arrays_need_x64(tmp_path):
    jq.save(tmp_path / "out", None, {"w": np.array([1 / 3])}, format="orbax")
    with pytest.raises(ValueError, match=r'w is float64; to load it, set jax.config.update\("jax_enable_x64", True\)'):
        jq.load(tmp_path / "out")


def test_layers_apart_are_stacked_and_the_other_way(tmp_path):
    model, params = random_model(INT4)
    jq.save(tmp_path / "out", model, params, format="orbax")
    apart_model, apart = jq.load_pretrained(tmp_path / "out", stacked=False)
    jq.save(tmp_path / "apart", apart_model, apart, format="orbax")
    same_params(jq.load_pretrained(tmp_path / "apart", stacked=True)[1], params)


def test_it_is_inspected_overwritten_and_converted(tmp_path):
    model, params = random_model(jq.int4(group_size=32, scale_dtype="float16"))
    jq.save(tmp_path / "out", model, params, format="orbax")
    found = inspection.inspect_checkpoint(tmp_path / "out")
    leaves = jax.tree.leaves(params, is_leaf=is_qtensor)
    assert found.stored_nbytes == found.nbytes == sum(leaf.nbytes for leaf in leaves)
    jq.save(tmp_path / "gptq", *jq.load_pretrained(tmp_path / "out"), format="gptq")
    same_params(jq.load_pretrained(tmp_path / "gptq")[1], params)
    jq.save(tmp_path / "out", model, params, overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "jaxquant.json", "model.safetensors"]
    (tmp_path / "other" / "arrays").mkdir(parents=True)
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds no checkpoint"):
        jq.save(tmp_path / "other", model, params, overwrite=True)


def test_what_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    original = orbax.OrbaxArrays.restore
    monkeypatch.setattr(orbax.OrbaxArrays, "restore", lambda *args: original(*args) + 1)
    with pytest.raises(OSError, match="array w reads back differently from what was written"):
        jq.save(tmp_path / "out", None, {"w": jnp.zeros(3)}, format="orbax")
    assert os.listdir(tmp_path) == []


def test_a_sharding_that_does_not_fit_is_named(tmp_path):
    jq.save(tmp_path / "out", None, {"w": jnp.zeros((6, 3))}, format="orbax")
    with pytest.raises(ValueError, match=r"the sharding of w does not fit \[6, 3\]"):
        jq.load(tmp_path / "out", sharding=lambda path, a: NamedSharding(mesh(4), PartitionSpec("model")))


def change_header(**fields):
    def change(directory):
        header = json.loads((directory / "jaxquant.json").read_text())
        (directory / "jaxquant.json").write_text(json.dumps(header | fields))

    return change


def in_all_files(old, new):
    def change(directory):
        for file in (directory / "arrays").rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes().replace(old, new))

    return change


def without(*names):
    def change(directory):
        for name in names:
            for file in directory.glob(name):
                file.unlink()

    return change


DAMAGED = {
    "version": (change_header(version=2), "version 2 is not known"),
    "empty": (change_header(empty={"x": 1}), "is no name, dtype and shape of an empty array"),
    "an empty array": (change_header(empty=[["x", "float32", [2]]]), "is no name, dtype and shape of an empty array"),
    "its dtype": (change_header(empty=[["x", "nonsense", [0]]]), "'x': .*nonsense"),
    "its shape": (change_header(empty=[["x", "float32", [0, -1]]]), "is no name, dtype and shape of an empty array"),
    "unknown": (change_header(tree=None), "does not mention the tensor w"),
    "no manifest": (without("arrays/manifest.ocdbt"), "manifest.ocdbt is missing"),
    "no metadata": (without("arrays/_METADATA"), "arrays"),
    "no data": (without("arrays/d/*", "arrays/ocdbt.process_0/d/*"), "arrays.* is damaged, Orbax does not read it"),
    "garbage": (in_all_files(b"\x00", b"\x01"), "arrays"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_directory_is_one_clear_error(tmp_path, damage):
    jq.save(tmp_path / "out", None, {"w": jnp.arange(300.0)}, format="orbax")
    change, message = DAMAGED[damage]
    change(tmp_path / "out")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        jq.load(tmp_path / "out")
    assert "\n" not in str(caught.value)
