"""Directories that appear whole or not at all, tensors in safetensors, and the native format."""

import collections
import functools
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxquant.checkpoints import huggingface, tensors
from jaxquant.checkpoints.directory import check_new_directory, new_directory
from jaxquant.checkpoints.huggingface import copy_companions, find_checkpoint
from jaxquant.checkpoints.json_file import read_json
from jaxquant.checkpoints.native import load_tree, save_tree
from jaxquant.checkpoints.tensors import Tensors, write_tensors
from jaxquant.numerics.affine import quantize
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import QuantSpec

OLD, NEW = {"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32", "uint32", "bool")


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array)
        assert tensors.same_bits(x, y)


def listing(directory):
    return sorted(os.listdir(directory))


# Directories


def test_new_directory_appears_when_the_block_ends(tmp_path):
    with new_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert listing(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_new_directory_replaces_an_empty_one_and_is_readable_as_the_umask_says(tmp_path):
    (tmp_path / "out").mkdir()
    save_tree(tmp_path / "out", OLD)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failure_leaves_nothing(tmp_path):
    def fail():
        with new_directory(tmp_path / "out") as directory:
            (directory / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert listing(tmp_path) == []


def _a_file(path):
    path.write_text("x")


def _a_link(path):
    (path.parent / "real").mkdir()
    path.symlink_to(path.parent / "real")


def _not_empty(path):
    save_tree(path, OLD)


def _no_checkpoint(path):
    path.mkdir()
    (path / "thesis.txt").write_text("x")


def _more_than_a_checkpoint(path):
    save_tree(path, OLD)
    (path / "thesis.txt").write_text("x")


def _a_checkpoint_of_checkpoints(path):
    save_tree(path, OLD)
    save_tree(path / "config.json", OLD)


def _a_configuration(path):
    path.mkdir()
    (path / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "overwrite", "message"),
    [
        (_a_file, True, "is a file; give a directory"),
        (_a_link, True, "is a symbolic link"),
        (_not_empty, False, r"exists and is not empty; pass overwrite=True \(--overwrite\)"),
        (_no_checkpoint, True, "holds no checkpoint .* only checkpoints are overwritten"),
        (_a_configuration, True, "holds no checkpoint"),
        (_more_than_a_checkpoint, True, "holds thesis.txt, which is no part of a checkpoint .* remove it yourself"),
        (_a_checkpoint_of_checkpoints, True, "holds config.json, which is no part"),
    ],
)
def test_an_output_that_must_not_be_replaced_is_refused_and_untouched(tmp_path, make, overwrite, message):
    make(tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(FileExistsError, match=message):
        save_tree(tmp_path / "out", NEW, overwrite=overwrite)
    with pytest.raises(FileExistsError, match=message):
        check_new_directory(tmp_path / "out", overwrite=overwrite)
    assert listing(tmp_path) == before


def test_a_parent_that_is_missing_or_cannot_be_written_to(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gone does not exist; create it before writing out into it"):
        save_tree(tmp_path / "gone" / "out", NEW)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="cannot write into"):
        save_tree(tmp_path / "out", NEW)


def test_overwrite_replaces_the_whole_directory(tmp_path):
    save_tree(tmp_path / "out", OLD)
    (tmp_path / "out" / "tokenizer.json").write_text("x")
    save_tree(tmp_path / "out", NEW, overwrite=True)
    assert_same_tree(load_tree(tmp_path / "out"), NEW)
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["jaxquant.json", "model.safetensors"]


def test_a_failed_overwrite_keeps_the_old_one(tmp_path):
    save_tree(tmp_path / "out", OLD)
    with pytest.raises(TypeError, match="w is a float"):
        save_tree(tmp_path / "out", {"w": 1.0}, overwrite=True)
    assert_same_tree(load_tree(tmp_path / "out"), OLD)
    assert listing(tmp_path) == ["out"]


def test_the_old_one_comes_back_when_the_new_one_cannot_be_put_in_place(tmp_path, monkeypatch):
    save_tree(tmp_path / "out", OLD)
    original = os.rename

    def rename(source, target):
        if ".partial-" in str(source):
            raise OSError("rename failed")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="rename failed"):
        save_tree(tmp_path / "out", NEW, overwrite=True)
    assert_same_tree(load_tree(tmp_path / "out"), OLD)
    assert listing(tmp_path) == ["out"]


def test_two_writers_at_once_do_not_touch_each_other(tmp_path):
    def both():
        with new_directory(tmp_path / "out") as first:
            save_tree(tmp_path / "out", NEW)  # clears up after killed runs, and must not take the first for one
            assert first.is_dir()

    with pytest.raises(FileExistsError, match="not empty"):
        both()
    assert_same_tree(load_tree(tmp_path / "out"), NEW)
    assert listing(tmp_path) == ["out"]


def test_many_writers_of_one_name_end_with_one_of_their_checkpoints(tmp_path):
    trees = [{"w": np.full(3, i, np.float32)} for i in range(4)]
    with ThreadPoolExecutor(len(trees)) as pool:
        for _ in range(10):
            for done in [pool.submit(save_tree, tmp_path / "out", tree, overwrite=True) for tree in trees]:
                done.result()
            assert listing(tmp_path) == ["out"]
            assert float(load_tree(tmp_path / "out")["w"][0]) in range(4)


KILLED_WRITER = """
    import os, signal, sys
    import numpy as np
    from jaxquant.checkpoints.native import save_tree

    def kill_at(module, name, nth):
        original, calls = getattr(module, name), []
        def wrapper(*args, **kwargs):
            calls.append(name)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(module, name, wrapper)

    kill_at(os, sys.argv[2], int(sys.argv[3]))
    save_tree(sys.argv[1], {"w": np.ones(3, np.float32)}, overwrite=True)
"""


def kill_while_writing(path, function, nth):
    """Runs a writer that is killed when it calls a function of `os` for the nth time."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED_WRITER), path, function, str(nth)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.parametrize(
    ("function", "nth", "kept"),
    [
        ("chmod", 1, OLD),  # the tensors are written, the header is not
        ("rename", 1, OLD),  # everything is written
        ("rename", 2, OLD),  # the old one is out of the way, the new one not in place: the next run puts it back
        ("rmdir", 2, NEW),  # the old one is being removed (first goes the probe of the name)
    ],
)
def test_a_killed_writer_leaves_the_old_checkpoint_or_the_new(tmp_path, function, nth, kept):
    save_tree(tmp_path / "out", OLD)
    kill_while_writing(tmp_path / "out", function, nth)
    assert len(listing(tmp_path)) == 2
    with pytest.raises(FileExistsError, match="not empty"):  # the next run clears up
        save_tree(tmp_path / "out", NEW)
    assert listing(tmp_path) == ["out"]
    assert_same_tree(load_tree(tmp_path / "out"), kept)


def test_a_killed_writer_leaves_nothing_under_a_new_name(tmp_path):
    kill_while_writing(tmp_path / "out", "rename", 1)
    assert [name.partition("-")[0] for name in listing(tmp_path)] == [".out.partial"]
    save_tree(tmp_path / "out", NEW)
    assert listing(tmp_path) == ["out"]


# Tensors


def test_tensors_are_written_as_safetensors_reads_them(tmp_path):
    written = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "bf16": jnp.ones((2, 3), jnp.bfloat16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float16),
        "bool": np.array([True, False]),
    }
    write_tensors(tmp_path, written)
    read, theirs = Tensors(tmp_path), safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(read) == set(theirs) == set(written)
    assert len(read) == len(written)
    for name, array in written.items():
        assert tensors.same_bits(read[name], array)
        assert tensors.same_bits(theirs[name], array)
        assert read.layout(name) == (array.dtype.name, array.shape)


def test_large_checkpoints_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD_BYTES", 100)
    written = {f"t{i}": np.full(10, i, np.float32) for i in range(5)} | {"large": np.zeros(1000, np.int8)}
    write_tensors(tmp_path, written)
    files = [name for name in listing(tmp_path) if name.endswith(".safetensors")]
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 40 + 1000}
    for name, file in index["weight_map"].items():
        assert tensors.same_bits(safetensors.numpy.load_file(tmp_path / file)[name], written[name])
    read = Tensors(tmp_path)
    assert all(tensors.same_bits(read[name], written[name]) for name in written)


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "S3", ">f4"])
def test_a_dtype_that_cannot_be_stored(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"w is .*, which cannot be stored; cast it to one of"):
        write_tensors(tmp_path, {"w": np.zeros(3, dtype)})
    assert listing(tmp_path) == []


def test_what_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    def corrupt(arrays, file, metadata):
        arrays = {name: np.where(array == 7, 6, array).astype(array.dtype) for name, array in arrays.items()}
        safetensors.numpy.save_file(arrays, file, metadata)

    monkeypatch.setattr(tensors, "save_file", corrupt)
    with pytest.raises(OSError, match="tensor w reads back differently from what was written"):
        save_tree(tmp_path / "out", {"w": np.arange(9)})
    assert listing(tmp_path) == []


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*model.safetensors: No space left on device"):
        save_tree(tmp_path / "out", OLD)


def sharded(directory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "SHARD_BYTES", 12)
        write_tensors(directory, {"a": OLD["w"], "b": NEW["w"]})


def edit_index(**weight_map):
    def edit(directory):
        file = directory / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        file.write_text(json.dumps({"weight_map": index["weight_map"] | weight_map}))

    return edit


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
DAMAGED_SHARDS = {
    "shard missing": (lambda d: (d / FIRST).unlink(), FileNotFoundError, f"{FIRST} is missing"),
    "shard a directory": (
        lambda d: ((d / FIRST).unlink(), (d / FIRST).mkdir()),
        FileNotFoundError,
        f"{FIRST} is missing",
    ),
    "parent": (edit_index(a="../x.safetensors"), ValueError, "in '../x.safetensors'; expected the name of"),
    "absolute": (edit_index(a="/etc/x.safetensors"), ValueError, "expected the name of a .safetensors file"),
    "below": (edit_index(a="x/y.safetensors"), ValueError, "expected the name of a .safetensors file"),
    "not a shard": (edit_index(a="config.json"), ValueError, "expected the name of a .safetensors file"),
    "no name": (edit_index(a=3), ValueError, "places a in 3; expected the name"),
    "not in its shard": (edit_index(c=FIRST), ValueError, f"{FIRST} lacks c, which {INDEX} places there"),
    "in the other shard": (edit_index(a=SECOND), ValueError, f"{SECOND} lacks a"),
    "in two shards": (
        lambda d: safetensors.numpy.save_file({"a": OLD["w"], "b": OLD["w"]}, d / SECOND),
        ValueError,
        f"tensor a lies in two files, {SECOND} is the second",
    ),
    "index twice": (
        lambda d: (d / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'),
        ValueError,
        "the key 'a' occurs twice",
    ),
    "no weight_map": (lambda d: (d / INDEX).write_text('{"metadata": {}}'), ValueError, "has no 'weight_map'"),
    "a list": (lambda d: (d / INDEX).write_text("[]"), ValueError, "holds a JSON list; expected an object"),
    "not JSON": (lambda d: (d / INDEX).write_text("{"), ValueError, f"{INDEX} is not valid JSON"),
    "not UTF-8": (lambda d: (d / INDEX).write_bytes(b"\xff\xfe{"), ValueError, "is not valid JSON"),
    "nested": (lambda d: (d / INDEX).write_text("[" * 10**5), ValueError, "is not valid JSON"),
    "digits": (lambda d: (d / INDEX).write_text("9" * 5000), ValueError, "is not valid JSON"),
}


def test_a_shard_that_disappears_is_named(tmp_path, monkeypatch):
    sharded(tmp_path, monkeypatch)
    tensors = Tensors(tmp_path)
    (tmp_path / FIRST).unlink()
    with pytest.raises(FileNotFoundError, match=f"{FIRST} has disappeared"):
        tensors["a"]


@pytest.mark.parametrize("damage", DAMAGED_SHARDS)
def test_damaged_shards_are_one_clear_error(tmp_path, monkeypatch, damage):
    sharded(tmp_path, monkeypatch)
    change, error, message = DAMAGED_SHARDS[damage]
    change(tmp_path)
    with pytest.raises(error, match=message) as caught:
        Tensors(tmp_path)
    assert "\n" not in str(caught.value)


def header(data=b"\0" * 8, **entry):
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        struct.pack("<Q", 10**18) + b"{}",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        header(data=b"\0" * 7),
        header(data=b"\0" * 9),
        header(shape=[-2]),
        header(shape=[2**63, 2]),
        header(data_offsets=[8, 0]),
        header(dtype="F31"),
    ],
)
def test_a_corrupt_file_is_one_clear_error(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is no readable safetensors file \(.*may be truncated"):
        Tensors(tmp_path)


def test_a_dtype_that_is_not_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(header(dtype="F8_E4M3", shape=[8]))
    with pytest.raises(ValueError, match="tensor w has dtype F8_E4M3; only BOOL, U8"):
        Tensors(tmp_path)


def test_a_directory_without_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor"):
        Tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"PyTorch pickles only \(pytorch_model.bin\).*convert it to safetensors"
    ):
        Tensors(tmp_path)


# The hub


def test_find_checkpoint(tmp_path, monkeypatch):
    assert find_checkpoint(tmp_path) == tmp_path
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="file is a file; give the directory"):
        find_checkpoint(tmp_path / "file")
    with pytest.raises(
        FileNotFoundError, match="gone' is no local directory, and the Hugging Face hub did not deliver"
    ):
        find_checkpoint(tmp_path / "gone")  # no valid hub id either: nothing is asked for

    def offline(name, **options):
        raise LocalEntryNotFoundError("Cannot find the snapshot\nin three lines\nof text")

    monkeypatch.setattr(huggingface, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"did not deliver it: Cannot find the snapshot$"):
        find_checkpoint("owner/model")


def test_a_hub_id_downloads_no_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface, "snapshot_download", download)
    assert find_checkpoint("owner/model") == tmp_path
    assert asked["name"] == "owner/model"
    assert {"*.safetensors", "*.json", "tokenizer.model"} <= set(asked["allow_patterns"])
    assert not any(pattern.endswith((".bin", ".pth", ".py")) for pattern in asked["allow_patterns"])


def test_companions_are_copied(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "config.json", "modeling.py"):
        (source / name).write_text(name)
    copy_companions(source, out)
    assert listing(out) == ["chat_template.jinja", "generation_config.json", "tokenizer.json"]


# The native format

keys = st.text(alphabet="ab/.%_é\n", max_size=3) | st.just("__metadata__")
integers = st.integers(-3, 10**20)


@st.composite
def arrays(draw):
    dtype = np.dtype(jnp.dtype(draw(st.sampled_from(DTYPES))))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype.kind == "b":
        content = bytes(byte % 2 for byte in content)
    array = np.frombuffer(content, dtype).reshape(shape)
    return array if draw(st.booleans()) else jnp.asarray(array)


@functools.cache
def qtensor(bits, symmetric, group_size):
    spec = QuantSpec(bits=bits, symmetric=symmetric, group_size=group_size)
    return quantize(jax.random.normal(jax.random.key(0), (2, 12, 5)), spec)


qtensors = st.builds(qtensor, st.sampled_from([3, 4, 8]), st.booleans(), st.sampled_from([None, 6]))


def containers(children):
    dicts = st.dictionaries(keys, children, max_size=3) | st.dictionaries(integers, children, max_size=3)
    return dicts | st.lists(children, max_size=3) | st.lists(children, max_size=3).map(tuple)


@settings(derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(tree=st.recursive(st.none() | arrays() | qtensors, containers, max_leaves=8))
def test_any_tree_comes_back_bit_for_bit(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("native") / "out"
    save_tree(path, tree)
    assert_same_tree(load_tree(path), tree)


def test_names_do_not_collide(tmp_path):
    tree = {
        "a": {"b": np.zeros(1), "": np.ones(1)},
        "a/b": np.full(1, 2.0),
        "a.b": np.full(1, 3.0),
        "a%2Fb": np.full(1, 4.0),
        "": {"a": {"b": np.full(1, 5.0)}},
        "__metadata__": np.full(1, 6.0),
        "%5F_metadata__": np.full(1, 7.0),
        "list": [{0: np.full(1, 8.0), -1: None}, ({"0": np.full(1, 9.0)},)],
    }
    tree = jax.tree.map(lambda a: a.astype(np.float32), tree)
    save_tree(tmp_path / "out", tree)
    assert_same_tree(load_tree(tmp_path / "out"), tree)
    assert {"a/b", "a%2Fb", "a.b", "a%252Fb", "/a/b", "list/0/0"} <= set(Tensors(tmp_path / "out"))


GRANULARITIES = ({}, {"group_size": 6}, {"granularity": "per_tensor"}, {"narrow_range": True})


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_spec_comes_back(tmp_path, bits):
    specs = [
        QuantSpec(bits=bits, symmetric=symmetric, scale_dtype="float16", **fields)
        for symmetric in (True, False)
        for fields in GRANULARITIES
    ]
    w = jax.random.normal(jax.random.key(0), (2, 12, 5))
    tree = {"heads": quantize(w, specs[0], contract=(-3, -2), out=(-1,)), "stacked": [quantize(w, s) for s in specs]}
    save_tree(tmp_path / "out", tree)
    read = load_tree(tmp_path / "out")
    assert_same_tree(read, tree)
    assert [q.spec for q in read["stacked"]] == specs
    assert read["heads"].in_shape == (2, 12)


def test_a_bare_leaf_and_an_empty_tree(tmp_path):
    for i, tree in enumerate([jnp.float32(3), {}, [], (), None, quantize(jnp.ones((4, 2)), QuantSpec())]):
        save_tree(tmp_path / str(i), tree)
        assert_same_tree(load_tree(tmp_path / str(i)), tree)


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [1.0]}, "a/0 is a float; only dicts, lists, tuples and None with arrays and QTensors"),
        (Pair(1, 2), "the tree is a Pair"),
        ({"a": {1: None, "1": None}}, r"a has keys \[1, '1'\]; use all strings or all integers"),
        ({True: None}, "the tree has keys .*; use all strings or all integers"),
        ({"a": collections.OrderedDict()}, "a is a OrderedDict"),
    ],
)
def test_a_tree_that_would_not_come_back_the_same_is_refused(tmp_path, tree, message):
    with pytest.raises(TypeError, match=message):
        save_tree(tmp_path / "out", tree)
    assert listing(tmp_path) == []


def test_an_invalid_qtensor_is_refused(tmp_path):
    q = jax.tree.map(lambda a: a[:2], quantize(jnp.ones((8, 4)), QuantSpec()))
    with pytest.raises(ValueError, match=r"a/q: values is .* contradicts"):
        save_tree(tmp_path / "out", {"a": {"q": q}})


def test_64_bit_arrays_need_x64(tmp_path):
    save_tree(tmp_path / "out", {"w": np.array([1 / 3])})
    with pytest.raises(ValueError, match=r'w is float64; to load it, set jax.config.update\("jax_enable_x64", True\)'):
        load_tree(tmp_path / "out")
    with jax.enable_x64(True):
        assert_same_tree(load_tree(tmp_path / "out"), {"w": np.array([1 / 3])})


def q_node(**fields):
    """Changes static fields of the QTensor at "q"."""
    return lambda h: h["tree"]["dict"][1][1]["qtensor"].update(fields)


def w_node(node):
    def change(h):
        h["tree"]["dict"][0][1] = node

    return change


def array_node(**fields):
    return lambda h: h["tree"]["dict"][0][1].update(fields)


def spec_of_q(**fields):
    return lambda h: h["tree"]["dict"][1][1]["qtensor"]["spec"].update(fields)


DAMAGED_HEADERS = {
    "format": (lambda h: h.update(format="pickle"), "is no header of a jaxquant checkpoint"),
    "no tree": (lambda h: h.pop("tree"), "is no header of a jaxquant checkpoint"),
    "version": (lambda h: h.update(version=2), "version 2 is not known, only 1; a newer jaxquant may read it"),
    "version a list": (lambda h: h.update(version=[1]), r"version \[1\] is not known"),
    "unknown node": (w_node({"set": []}), "json: w is no node of a tree"),
    "extra key": (array_node(extra=1), "w is no node of a tree"),
    "no pairs": (lambda h: h["tree"].update(dict=[["w"]]), "the tree has an entry that is no pair"),
    "a key twice": (lambda h: h["tree"]["dict"].append(["w", None]), "the tree has a key twice"),
    "a key that is a list": (lambda h: h["tree"]["dict"].append([[], None]), "no pair of key and node"),
    "missing tensor": (array_node(array="x"), "w is the tensor 'x', which is missing from the files"),
    "left over tensor": (w_node(None), "does not mention the tensor w"),
    "shape": (array_node(shape=[4]), r"w should be float32\[4\], but the file holds float32\[3\]"),
    "dtype": (array_node(dtype="bfloat16"), r"w should be bfloat16\[3\]"),
    "no dtype": (array_node(dtype="nonsense"), "nonsense"),
    "raw dtype": (array_node(dtype="float8_e4m3fn"), r"w should be float8_e4m3fn\[3\]"),
    "bits": (spec_of_q(bits=9), "q: bits=9 is not supported"),
    "other bits": (spec_of_q(bits=7), "q: values is uint8.*contradicts the rest"),
    "unknown spec field": (spec_of_q(magic=1), "q: .*unexpected keyword argument 'magic'"),
    "no bool": (spec_of_q(symmetric="yes"), "q: .*must be True or False"),
    "group size": (spec_of_q(group_size=3, granularity=None), "q: group_size=3 does not divide"),
    "asymmetric": (spec_of_q(symmetric=False), "q: symmetric=False, but zero_point is None"),
    "no spec": (q_node(spec=None), "q: .*must be a mapping"),
    "dtype of q": (q_node(dtype="int8"), "q: dtype='int8' is no floating dtype"),
    "no dtype of q": (q_node(dtype=None), "q: dtype=None is no floating dtype"),
    "axes": (q_node(contract=[-1]), "q: contract=.*expected different negative axes"),
    "no axes": (q_node(contract="x"), "q: contract='x' is no list of integers"),
    "in_shape": (q_node(in_shape=[9]), "q: values is .*contradicts the rest"),
    "longer in_shape": (q_node(in_shape=[2, 4]), r"q: in_shape=\[2, 4\] does not fit contract"),
    "negative in_shape": (q_node(in_shape=[-8]), r"q: in_shape=\[-8\] does not fit contract"),
    "no values": (q_node(values=None), "q: values is no array"),
    "values a tree": (q_node(values={"list": []}), "q: values is no array"),
    "unknown field": (q_node(magic=None), "q has the fields .*; expected"),
}


@pytest.mark.parametrize("damage", DAMAGED_HEADERS)
def test_a_damaged_header_is_one_clear_error(tmp_path, damage):
    save_tree(tmp_path / "out", {"w": OLD["w"], "q": quantize(jnp.ones((8, 4)), QuantSpec(bits=4))})
    file = tmp_path / "out" / "jaxquant.json"
    header = json.loads(file.read_text())
    change, message = DAMAGED_HEADERS[damage]
    change(header)
    file.write_text(json.dumps(header))
    with pytest.raises(ValueError, match=message) as caught:
        load_tree(tmp_path / "out")
    assert "jaxquant.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_header(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"jaxquant.json is missing"):
        load_tree(tmp_path)


def test_the_header_is_what_the_docstring_says(tmp_path):
    tree = {"a": [None, (np.zeros((2, 3), ml_dtypes.bfloat16),)], "q": quantize(jnp.ones((8, 4)), QuantSpec(bits=4))}
    save_tree(tmp_path / "out", tree)
    header = read_json(tmp_path / "out" / "jaxquant.json")
    assert header["format"] == "jaxquant"
    assert header["version"] == 1
    (_, a), (_, q) = header["tree"]["dict"]
    assert a == {"list": [None, {"tuple": [{"array": "a/1/0", "dtype": "bfloat16", "shape": [2, 3]}]}]}
    assert q["qtensor"]["spec"]["bits"] == 4
    assert q["qtensor"]["values"] == {"array": "q/values", "dtype": "uint8", "shape": [4, 4]}
    assert "zero_point" not in q["qtensor"]
    assert is_qtensor(load_tree(tmp_path / "out")["q"])
