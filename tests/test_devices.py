"""Any number of devices, of one process or of several: the same codes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from meshes import SPLIT, P, mesh_of, model, params_of, put

import jaxquant as jq

SIZES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}
W4 = jq.int4(group_size=8)


def wide(tree):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)


def batches():
    return [normal(8, 64, 16, seed=i) for i in range(2)]


def logits(params, tokens):
    return jq.quantized(model)(params, jax.nn.one_hot(tokens, 16, dtype=params["up"].dtype))


def codes_of(qparams):
    return {name: np.asarray(q.codes) for name, q in qparams.items()}


@pytest.fixture(scope="module")
def alone():
    """Codes, perplexity and errors of GPTQ in float64 on one device."""
    with jax.enable_x64(True):
        params = wide(params_of())
        qparams, report = jq.quantize_params(params, jq.calibrate(model, params, wide(batches())), jq.GPTQ(W4))
        tokens = np.random.default_rng(0).integers(0, 16, 130)
        return codes_of(qparams), jq.perplexity(logits, qparams, tokens, context=8), [r.error for r in report.layers]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.usefixtures("float64")
def test_codes_are_the_same_on_any_number_of_devices(alone, count):
    mesh = mesh_of(data=SIZES[count][0], model=SIZES[count][1])
    params = put(wide(params_of()), mesh, SPLIT)
    stats = jq.calibrate(model, params, [put(x, mesh, P("data")) for x in wide(batches())])
    qparams, report = jq.quantize_params(params, stats, jq.GPTQ(W4))
    for name, want in alone[0].items():
        np.testing.assert_array_equal(np.asarray(qparams[name].codes), want)
        values = qparams[name].values  # whose output channels are on all devices
        assert values.sharding.shard_shape(values.shape)[-1] * count == values.shape[-1]
    np.testing.assert_allclose([row.error for row in report.layers], alone[2], rtol=1e-9)
    tokens = np.random.default_rng(0).integers(0, 16, 130)
    assert jq.perplexity(logits, qparams, tokens, context=8) == pytest.approx(
        alone[1], rel=1e-6
    )  # evaluation sums in float32


def test_scaled_channels_give_the_same_codes_on_eight_devices(float64):
    """Not those of AWQ: scales from sums over devices, and extremes of groups that lie half way between two codes."""
    config = jq.SmoothQuant(0.5, jq.int8(narrow_range=True))  # so that the extremes of columns are codes
    params, data = wide(params_of()), wide(batches())
    want, _ = jq.quantize_params(params, jq.calibrate(model, params, data), config)
    mesh = mesh_of()
    split = put(params, mesh, SPLIT)
    stats = jq.calibrate(model, split, [put(x, mesh, P("data")) for x in data])
    got, _ = jq.quantize_params(split, stats, config)
    for name in want:
        np.testing.assert_array_equal(np.asarray(got[name].codes), np.asarray(want[name].codes))


def test_two_processes_of_four_devices_give_the_codes_of_one_device(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    processes = [
        subprocess.Popen(
            [sys.executable, here / "hosts.py", str(port), str(i), tmp_path / "found.npz"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment | cache
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    found = np.load(tmp_path / "found.npz")
    for name, want in alone[0].items():
        np.testing.assert_array_equal(found[name], want)
    np.testing.assert_allclose(found["errors"], alone[2], rtol=1e-9)
    assert float(found["perplexity"]) == pytest.approx(alone[1], rel=1e-6)  # evaluation sums in float32
