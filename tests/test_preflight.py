"""What a run will take, against what it has taken."""

import re
import types

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import workflows
from jaxquant.preflight import Preflight, duration
from jaxquant.transforms import memory
from jaxquant.transforms.memory import MemoryEstimate
from jaxquant.transforms.stream import Needs
from jaxquant.transforms.tracing.interpreter import named_leaves

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    model = jq.Model.from_hf(CONFIG)
    jq.save(folder / "model", model, model.init(jax.random.key(0)))
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 128, (4, 32)))
    return folder


def preflight(source, config, **more):
    _, params = jq.load_pretrained(source / "model")
    layer = dict(named_leaves({"layers": jax.tree.map(lambda a: a[:1], params["layers"])}))
    outer = sum(a.nbytes for name, tree in params.items() if name != "layers" for a in jax.tree.leaves(tree))
    configs = {path: config for path in layer if path.endswith("kernel")}
    given = {"activations": 0, "held": 0, "tokens": 0, "calibration": None, **more}
    return Preflight(layer, configs, 3, outer, **given)


@pytest.mark.parametrize("format", ["jaxquant", "compressed-tensors"])
@pytest.mark.parametrize("config", [jq.RTN(jq.int4(group_size=32)), jq.RTN(jq.QuantSpec(bits=3, symmetric=False))])
def test_room_on_the_disk(source, tmp_path, format, config):
    workflows.quantize_checkpoint(source / "model", tmp_path / "out", config, format=format)
    taken = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert taken <= preflight(source, config).checkpoint < taken + 3 * 9 * 3000  # headers, at most


def test_channel_scales_take_room(source):
    spec = jq.int4(group_size=32)
    more = preflight(source, jq.AWQ(spec)).checkpoint - preflight(source, jq.RTN(spec)).checkpoint
    assert more == 3 * 4 * (6 * 128 + 256)  # inputs of six weights of the hidden size, and of down_proj


def disk_of(free):
    return lambda path: types.SimpleNamespace(free=free)


def test_a_disk_without_room_is_refused_before_any_work(source, tmp_path, monkeypatch):
    config, files = jq.RTN(jq.int4(group_size=32)), {"calibration": str(source / "tokens.npy"), "num_samples": 4}
    room = preflight(source, config).checkpoint + 2 * 4 * 4 * 32 * 128  # float32 inputs of a layer, twice
    monkeypatch.setattr("jaxquant.preflight.shutil.disk_usage", disk_of(room - 1))
    with pytest.raises(ValueError, match=r"out takes about .* on disk .*, but .* are free; make room, or write elsew"):
        workflows.quantize_checkpoint(source / "model", tmp_path / "out", config, **files)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "run.json").write_bytes(bytes(1))  # what is there already has its room
    workflows.quantize_checkpoint(source / "model", tmp_path / "out", config, resume=False, **files)


def test_all_of_it_is_told_before_the_first_layer(source, tmp_path, caplog):
    def progress(what, done, total):
        if done == 0:
            told.append(caplog.text)

    told = []
    caplog.set_level("INFO", "jaxquant")
    config, files = jq.GPTQ(jq.int4(group_size=32)), {"calibration": str(source / "tokens.npy"), "num_samples": 4}
    workflows.quantize_checkpoint(source / "model", tmp_path / "out", config, **files, progress=progress)
    layers = r"quantizing layer by layer will allocate about .*one layer 0\.\d MiB, activations 0\.2 MiB, statistics"
    assert re.search(layers, told[0])
    assert re.search(r"it will take about .* on disk \(the checkpoint .*\); .* are free", told[0])
    assert re.search(r"it will take about \d+ s, beside compiling", told[0])


def test_memory_is_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda devices: 2**20)
    config = jq.RTN(jq.int4(group_size=32))
    with pytest.raises(ValueError, match=r"quantizing layer by layer will allocate .* fewer or shorter samples"):
        workflows.quantize_checkpoint(source / "model", tmp_path / "out", config)
    assert list(tmp_path.iterdir()) == []


def test_parts_of_memory(source):
    estimate = MemoryEstimate("calibrate", {"statistics": 10**6, "activations or results": 10**8}, "")
    given = {"activations": 700, "held": 777, "calibration": Needs(estimate, 0, 0)}
    parts = preflight(source, jq.GPTQ(jq.int4()), **given).memory.parts
    weights = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256
    assert parts == {"one layer": 4 * (weights + 2 * 128), "activations": 777 + 700, "statistics": 10**6, "work": 10**8}


def test_operations_and_durations(source):
    estimate = Needs(MemoryEstimate("calibrate", {}, ""), 0, statistics=4 * 128 * 128)
    given = (None, estimate)
    forward, calibrated = (preflight(source, jq.RTN(jq.int4()), tokens=100, calibration=c).operations for c in given)
    weights = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256
    assert (forward, calibrated) == (3 * 2 * 100 * weights, 3 * 100 * (2 * weights + 128 * 128))
    assert preflight(source, jq.GPTQ(jq.int4()), tokens=100).operations > forward
    assert [duration(seconds) for seconds in (0.2, 119, 125, 9000)] == ["1 s", "119 s", "2 min", "2.5 h"]
