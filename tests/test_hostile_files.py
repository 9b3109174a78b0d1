"""Checkpoints from anywhere: whatever is in them, they load or are one clear error, and nothing else happens.

`JAXQUANT_FUZZ=10000 pytest tests/test_hostile_files.py` damages as many files; by default it is some hundreds.
"""

import contextlib
import copy
import gc
import json
import math
import os
import pickle
import random
import resource
import shutil
import struct
import time

import jax
import pytest
from small_models import in_order_of_groups, random_model

import jaxquant as jq
from jaxquant.numerics.qtensor import is_qtensor

CASES = int(os.environ.get("JAXQUANT_FUZZ", "290"))
ROOM = 3 * 2**30  # bytes of address space that reading may take
SLOWEST = 20  # CPU seconds that reading a few kilobytes may take
SMALL = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8}  # fmt: skip
LLM_INT8 = jq.LLMInt8(6.0, jq.int8(narrow_range=True), outliers=0).spec
HALF = jq.int4(group_size=16, symmetric=False, scale_dtype="float16")
FORMATS = {  # format, and codes
    "float": ("jaxquant", None),
    "jaxquant": ("jaxquant", jq.QuantSpec(3, 16, symmetric=False)),
    "pack-quantized": ("compressed-tensors", jq.QuantSpec(4, 16, symmetric=False)),
    "group": ("compressed-tensors", jq.int4(group_size=16)),
    "int-quantized": ("compressed-tensors", jq.int8(activations=jq.ActivationSpec())),
    "gptq": ("gptq", HALF),
    "awq": ("awq", HALF),
    "bitsandbytes": ("bitsandbytes", LLM_INT8),
    "orbax": ("orbax", jq.QuantSpec(3, 16, symmetric=False)),
}
EFFORT = {name: 0.25 if name == "orbax" else 1 for name in FORMATS}  # its readers take longer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, (format, spec) in FORMATS.items():
        model, params = random_model(spec, **SMALL)
        if name == "group":
            params = jax.tree.map(in_order_of_groups, params, is_leaf=is_qtensor)
        jq.save(root / name, model, params, format=format)
        jq.load_pretrained(root / name)  # compiles what reading needs
    return root


@contextlib.contextmanager
def little_memory():
    """Allocations of more than `ROOM` fail."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def complaint(directory):
    """The error that reading a directory ends with; None if it is read. Any other kind of error goes on."""
    try:
        jq.load_pretrained(directory)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


# Mutations: each takes a random number generator and the bytes of a file, and returns others


def flip_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30])):
        if data:
            data[rng.randrange(len(data))] = rng.choice([0, 1, 0x22, 0x5C, 0x7B, 0x7D, 0x80, 0xFF, rng.randrange(256)])
    return bytes(data)


def flip_early_bytes(rng, data):
    """Where headers are."""
    cut = min(len(data), 600)
    return flip_bytes(rng, data[:cut]) + data[cut:]


def cut_short(rng, data):
    return data[: rng.randrange(len(data) + 1)]


def cut_out(rng, data):
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice([1, 2, 7, 100]) :]


def put_in(rng, data):
    start = rng.randrange(len(data) + 1)
    more = rng.choice([b"\0" * 8, b"[" * 2000, b"{" * 2000, b'"', b",", b"-", b"9" * 5000, os.urandom(16), b"\xff\xfe"])
    return data[:start] + more + data[start:]


def repeat(rng, data):
    start = rng.randrange(len(data) + 1)
    return data + data[start:]


NASTY = [
    *(None, True, False, -1, 0, 1, 2, 3, 5, 7, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, "", "x"),
    *(float("nan"), float("inf"), "0", "float32", "int32", "gptq", "../../../etc/passwd", "/etc/passwd", "a/b", "\0"),
    *("re:(.*)*x", "re:.*.*.*.*x", "\ud800", "x" * 500, [], {}, [[]], {"": {}}, [0], [-1], [2**62, 2**62], ["x"] * 50),
    *("I64", "F8_E4M3", "BOOL", "F4", [0, 0], [8, 0], [0, 2**63], {"bits": 4}, [[[[[[[[]]]]]]]]),
]


def change_json(rng, value):
    """Another value somewhere inside, a key less, or a key more."""
    places = []

    def visit(inner):
        items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, child in items:
            places.append((inner, key))
            visit(child)

    visit(value)
    if not places:
        return copy.deepcopy(rng.choice(NASTY))
    inner, key = rng.choice(places)
    what = rng.randrange(8)
    if what == 0:
        del inner[key]
    elif what == 1 and isinstance(inner, dict):
        inner[str(copy.deepcopy(rng.choice(NASTY)))] = inner.pop(key)
    elif what == 2 and isinstance(inner[key], int | float):
        inner[key] = inner[key] + rng.choice([1, -1, 8, 16, 2**31]) if rng.random() < 0.7 else -inner[key]
    elif what == 3:
        inner[key] = json.loads(json.dumps(rng.choice(places)[0]))
    else:
        inner[key] = copy.deepcopy(rng.choice(NASTY))
    return value


def mutate_json(rng, data):
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        value = change_json(rng, value)
    return json.dumps(value).encode()


def mutate_header(rng, data):
    """The header of a safetensors file, with its length made to fit or not."""
    size = int.from_bytes(data[:8], "little")
    header = mutate_json(rng, data[8 : 8 + size])
    length = rng.choice([len(header)] * 8 + [0, len(header) + 1, 2**31, 2**63, 2**64 - 1])
    return struct.pack("<Q", length) + header + data[8 + size :]


def swap_words(rng, data):
    """Numbers in the arrays: indices, zero points, scales."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 10, 100])):
        start = rng.randrange(max(1, len(data) - 4))
        data[start : start + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\0\0\xc0\x7f", b"\0\0\0\x80", os.urandom(4)])
    return bytes(data)


ANY_FILE = (flip_bytes, flip_early_bytes, cut_short, cut_out, put_in, repeat)


def mutations_of(file):
    if file.suffix == ".json" or file.name.startswith("_"):
        return (*ANY_FILE, mutate_json, mutate_json, mutate_json, mutate_json, mutate_json, mutate_json)
    if file.suffix == ".safetensors":
        return (*ANY_FILE, mutate_header, mutate_header, mutate_header, mutate_header, swap_words, swap_words)
    return (*ANY_FILE, swap_words)


def damage(rng, directory):
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name != "quantize_config.json")
    file = rng.choice(files)
    mutation = rng.choice(mutations_of(file))
    data = file.read_bytes()
    try:
        changed = mutation(rng, data)
    except (UnicodeEncodeError, ValueError):  # a value that JSON itself has no text for
        changed = cut_short(rng, data)
    file.write_bytes(changed)
    return f"{mutation.__name__} of {file.relative_to(directory)}"


def expect_one_line(told):
    assert told.strip()
    assert "\n" not in told
    assert len(told) < 20_000  # it may repeat what was wrong


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves coroutines behind
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_read_or_one_clear_error(checkpoints, tmp_path, name):
    read, seeds = 0, range(math.ceil(CASES * EFFORT[name] / sum(EFFORT.values())))
    before = sorted(os.listdir(checkpoints)), os.getcwd(), sorted(os.listdir("."))
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        shutil.copytree(checkpoints / name, tmp_path / "x")
        what = f"seed {seed}: {damage(rng, tmp_path / 'x')}"
        start = time.process_time()
        try:
            with little_memory():
                told = complaint(tmp_path / "x")
            if told is None:
                read += 1
            else:
                expect_one_line(told)
            assert time.process_time() - start < SLOWEST
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}"[:2000]) from error
        assert os.listdir(tmp_path) == ["x"], what
        shutil.rmtree(tmp_path / "x")
    assert before == (sorted(os.listdir(checkpoints)), os.getcwd(), sorted(os.listdir(".")))
    assert read < len(seeds)  # the damage is noticed
    gc.collect()  # what was left behind complains here, where it is expected, and not when the tests end


def test_pickles_are_never_opened(checkpoints, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'run'}",)

    out = tmp_path / "x"
    shutil.copytree(checkpoints / "float", out)
    (out / "jaxquant.json").unlink()
    for name, message in (("pytorch_model.bin", "holds PyTorch pickles only"),
                          ("model.safetensors", "no readable safetensors file")):  # fmt: skip
        (out / "model.safetensors").unlink(missing_ok=True)
        (out / name).write_bytes(pickle.dumps(Bomb()))
        assert message in complaint(out)
    assert os.listdir(tmp_path) == ["x"]


def test_json_of_any_size_takes_little_memory(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "gptq", tmp_path / "x")
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / "x" / "model.safetensors").unlink(missing_ok=name != "config.json")
        with open(tmp_path / "x" / name, "wb") as file:
            file.truncate(10**12)  # takes no space
        with little_memory():
            assert "has 1000000000000 bytes; no such file" in complaint(tmp_path / "x")
        shutil.copy(checkpoints / "gptq" / "config.json", tmp_path / "x")


LINKED = {"float": ["config.json", "jaxquant.json", "model.safetensors"], "gptq": ["model.safetensors"]}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in LINKED.items() for file in files])
def test_links_out_of_the_directory_are_not_followed(checkpoints, tmp_path, name, file):
    shutil.copytree(checkpoints / name, tmp_path / "x")
    (tmp_path / "x" / file).rename(tmp_path / file)
    (tmp_path / "x" / file).symlink_to(tmp_path / file)
    assert "is a link out of its directory" in complaint(tmp_path / "x")


def test_links_inside_of_the_hub_cache_are_followed(checkpoints, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted((checkpoints / "gptq").iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert complaint(snapshot) is None
    model, params = jq.load_pretrained(snapshot)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0")
    jq.save(tmp_path / "out", model, params)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    (tmp_path / "secret").write_text("x")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"vocab.txt is a link out of its directory"):
        jq.save(tmp_path / "again", model, params)
    assert not (tmp_path / "again").exists()
