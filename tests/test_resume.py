"""Runs that are killed, and those that continue them."""

import json
import os
import shutil
import signal
import time

import jax
import killed
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.checkpoints.native import load_tree, save_tree
from jaxquant.checkpoints.tensors import Tensors

KILLS = 20
OLD = {"w": np.zeros(3, np.float32)}


def files_of(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def run(target, *args):
    """Runs a function in a process of its own; returns its exit code."""
    process = killed.processes().Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


def test_a_run_that_is_killed_before_any_change_of_the_disk_is_continued(tmp_path):
    killed.write_parts(tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    assert {name: Tensors(tmp_path / "whole")[name].tolist() for name in ("w0", "w1", "w2")} == {
        "w0": [0, 1, 2, 3],
        "w1": [0, 3, 6, 9],
        "w2": [1, 10, 19, 28],
    }
    for nth in range(1, 1000):
        out = tmp_path / str(nth)
        save_tree(out, OLD)
        code = run(killed.write_parts, out, nth)
        if code == 0:
            assert nth > 40  # all changes have had their turn
            break
        assert code == -signal.SIGKILL
        if out.exists() and files_of(out) != whole:  # it is missing for a moment, and then in a sibling
            np.testing.assert_array_equal(load_tree(out)["w"], OLD["w"])
        killed.write_parts(out)
        assert files_of(out) == whole
        assert [name for name in os.listdir(tmp_path) if name.startswith(f".{nth}.")] == []
    assert files_of(out) == whole


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model of many layers, tokens for it, and what becomes of it in a run that is not interrupted."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    made = jq.Model.from_hf(config)
    jq.save(folder / "model", made, made.init(jax.random.key(0)))
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 64, (4, 16)))
    arguments = folder / "model", folder / "whole", folder / "tokens.npy", jax.config.jax_compilation_cache_dir
    assert run(killed.quantize, *arguments) == 0
    return arguments


def test_a_run_that_is_killed_at_random_moments_gives_what_it_would_have_given(model, tmp_path):
    source, whole, tokens, cache = model
    rng, kills, finished, resumed = np.random.default_rng(0), 0, 0, 0
    while kills < KILLS or not finished:
        out = tmp_path / str(finished)
        here, there = killed.processes().Pipe(duplex=False)
        process = killed.processes().Process(target=killed.quantize, args=(source, out, tokens, cache, there))
        process.start()
        there.close()
        try:
            resumed += here.recv() > 1  # the first layer that it has done itself
            time.sleep(rng.uniform(0, 0.3))
        except EOFError:  # only what is outside of the layers was left
            pass
        if kills < KILLS:
            process.kill()
        process.join()
        here.close()
        if process.exitcode == 0:
            assert files_of(out) == files_of(whole)
            assert json.loads(out.with_name(f"{out.name}.report.json").read_text()) == json.loads(
                whole.with_name("whole.report.json").read_text()
            )
            assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
            finished += 1
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            if out.exists():  # killed after the last step
                assert files_of(out) == files_of(whole)
                finished += 1
                shutil.rmtree(tmp_path / f".{out.name}.unfinished", ignore_errors=True)
    assert resumed > KILLS // 2
