"""Runs that are killed, and those that continue them."""

import json
import os
import shutil
import signal
import threading
import time

import jax
import killed
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

import jaxquant as jq
from jaxquant import workflows
from jaxquant.checkpoints import resumable, tensors
from jaxquant.checkpoints.native import load_tree, save_tree
from jaxquant.checkpoints.resumable import resumable_directory
from jaxquant.checkpoints.tensors import Tensors
from jaxquant.models.names import tensors_from_params

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


def first_part(directory):
    save_file({"a": OLD["w"]}, directory / "a.safetensors")


def write_one(out, fingerprint, note=None, **options):
    """Writes the first of two parts, and fails in the second."""
    with resumable_directory(out, fingerprint, **options) as run:
        if not run.notes:
            run.add(lambda directory: first_part(directory) or note)
        assert run.notes == [note]
        raise OSError("the second part fails")


def test_what_is_done_is_kept_and_nothing_else(tmp_path, caplog):
    caplog.set_level("INFO", "jaxquant")
    with pytest.raises(OSError, match="the second part fails"):
        write_one(tmp_path / "out", {"model": "m"}, 1)
    assert "1 parts are done and kept in" in caplog.text
    assert os.listdir(tmp_path) == [".out.unfinished"]
    with pytest.raises(OSError, match="the second part fails"):
        write_one(tmp_path / "out", {"model": "m"}, 1)
    assert "continuing after 1 parts" in caplog.text
    with pytest.raises(AssertionError):  # what was done is removed, and then there is another note
        write_one(tmp_path / "out", {"model": "m"}, 2)
    with pytest.raises(OSError, match="the second part fails"):
        write_one(tmp_path / "out", {"model": "m"}, 2, resume=False)


def test_a_run_that_has_done_nothing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), resumable_directory(tmp_path / "out", {}):
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("parts", [1, 2])
def test_what_the_disk_refuses_while_the_next_part_is_made_is_not_lost(tmp_path, monkeypatch, parts):
    def full(*args):
        raise OSError("no room for the state")

    def write():
        with resumable_directory(tmp_path / "out", {}) as run:
            for _ in range(parts):
                run.add(first_part, {"x": OLD["w"]})

    monkeypatch.setattr(resumable, "write_tensors", full)
    with pytest.raises(OSError, match="no room"):
        write()
    assert os.listdir(tmp_path) == []


def test_who_is_interrupted_while_the_disk_is_waited_for_keeps_the_part(tmp_path, monkeypatch):
    interrupted = threading.Event()

    def slow(*args):
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.wait()

    def write():
        with resumable_directory(tmp_path / "out", {}) as run:
            run.add(first_part, {"x": OLD["w"]})
            try:
                run.settle()
            finally:
                interrupted.set()

    monkeypatch.setattr(resumable, "write_tensors", slow)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert sorted(os.listdir(tmp_path / ".out.unfinished")) == ["00001.json", "checkpoint", "run.json", "state-00001"]


def test_an_unfinished_run_of_something_else_is_refused_and_kept(tmp_path):
    mine = {"model": "m", "recipe": "r", "data": "d"}
    with pytest.raises(OSError, match="the second part fails"):
        write_one(tmp_path / "out", mine)
    before = sorted(map(str, tmp_path.rglob("*")))
    for other, message in (({"recipe": "s"}, "recipe"), ({"model": "n", "data": "e"}, "model, data")):
        with pytest.raises(ValueError, match=rf"an unfinished run of another {message}; begin anew with .*--no-resume"):
            write_one(tmp_path / "out", mine | other)
        assert sorted(map(str, tmp_path.rglob("*"))) == before
    with pytest.raises(OSError, match="the second part fails"):
        write_one(tmp_path / "out", mine)


def test_a_second_run_with_the_same_output_is_refused(tmp_path):
    with resumable_directory(tmp_path / "out", {}) as run:
        with pytest.raises(OSError, match=r"another run is writing .*out; wait until it has ended"):
            write_one(tmp_path / "out", {})
        with pytest.raises(OSError, match="another run is writing"):
            write_one(tmp_path / "out", {}, resume=False)
        run.add(first_part)
        run.index()
    np.testing.assert_array_equal(Tensors(tmp_path / "out")["a"], OLD["w"])


@pytest.mark.parametrize("change", ["cut", "gone", "bits"])
def test_parts_that_have_changed_are_refused(tmp_path, change):
    with pytest.raises(OSError, match="the second part fails"):
        write_one(tmp_path / "out", {})
    file = tmp_path / ".out.unfinished" / "checkpoint" / "model-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-1], "bits": content[:-1] + b"\x01", "gone": b""}[change])
    if change == "gone":
        file.unlink()
    with pytest.raises(ValueError, match=r"model-00001.safetensors is not what the unfinished run has written; begin"):
        write_one(tmp_path / "out", {})


def test_a_part_that_disappears_is_named_and_nothing_is_installed(tmp_path):
    def write():
        with resumable_directory(tmp_path / "out", {}) as run:
            run.add(first_part)
            run.settle()
            (run.directory / "model-00001.safetensors").unlink()
            run.index()

    with pytest.raises(FileNotFoundError, match=r"model-00001.safetensors is missing"):
        write()
    assert not (tmp_path / "out").exists()


def test_what_is_no_directory_is_no_unfinished_run(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"\.out\.unfinished is no directory"):
        write_one(tmp_path / "out", {})


ROUND = jq.RTN(jq.int4(group_size=8))


@pytest.fixture(scope="module")
def shards(model, tmp_path_factory):
    """The model as transformers stores it, a file for each tensor; and what it is rounded to."""
    folder = tmp_path_factory.mktemp("shards")
    shutil.copytree(model[0], folder / "source")
    made, params = jq.load_pretrained(model[0])
    for file in ("jaxquant.json", "model.safetensors"):
        (folder / "source" / file).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "SHARD_BYTES", 1)
        tensors.write_tensors(folder / "source", tensors_from_params(made.config, params))
    workflows.quantize_checkpoint(folder / "source", folder / "whole", ROUND)
    return folder


def progress_with(what, at):
    def progress(name, done, total):
        if (name, done) == ("quantizing", at):
            what()

    return progress


def test_a_shard_that_disappears_midway_is_named_and_the_run_goes_on_when_it_is_back(shards, tmp_path):
    names = json.loads((shards / "source" / tensors.INDEX).read_text())["weight_map"]
    shard = shards / "source" / names["model.layers.7.mlp.up_proj.weight"]
    hide = progress_with(lambda: shard.rename(tmp_path / "hidden"), 3)
    with pytest.raises(FileNotFoundError, match=f"{shard.name} has disappeared while it was read"):
        workflows.quantize_checkpoint(shards / "source", tmp_path / "out", ROUND, progress=hide)
    assert not (tmp_path / "out").exists()
    (tmp_path / "hidden").rename(shard)
    workflows.quantize_checkpoint(shards / "source", tmp_path / "out", ROUND)
    assert files_of(tmp_path / "out") == files_of(shards / "whole")


def test_a_disk_that_fills_up_is_named_and_the_run_goes_on_when_there_is_room(shards, tmp_path):
    with pytest.MonkeyPatch.context() as patch:

        def full(*args, **kwargs):
            raise safetensors.SafetensorError("No space left on device")

        fill = progress_with(lambda: patch.setattr(tensors, "save_file", full), 5)
        with pytest.raises(OSError, match=r"cannot write .*: No space left on device"):
            workflows.quantize_checkpoint(shards / "source", tmp_path / "out", ROUND, progress=fill)
    assert not (tmp_path / "out").exists()
    begun = []
    note = progress_with(lambda: begun.append(5), 5)
    workflows.quantize_checkpoint(shards / "source", tmp_path / "out", ROUND, progress=note)
    assert not begun
    assert files_of(tmp_path / "out") == files_of(shards / "whole")


def test_another_recipe_or_model_does_not_continue_a_run(shards, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        workflows.quantize_checkpoint(shards / "source", tmp_path / "out", ROUND, progress=progress_with(stop, 2))
    with pytest.raises(ValueError, match="unfinished run of another recipe; begin anew"):
        workflows.quantize_checkpoint(shards / "source", tmp_path / "out", jq.RTN(jq.int3(group_size=8)))
    with pytest.raises(ValueError, match="unfinished run of another format; begin anew"):
        workflows.quantize_checkpoint(shards / "source", tmp_path / "out", ROUND, format="compressed-tensors")
    other = jq.Model.from_hf(json.loads((shards / "source" / "config.json").read_text()))
    jq.save(tmp_path / "other", other, other.init(jax.random.key(1)))
    with pytest.raises(ValueError, match="unfinished run of another model; begin anew"):
        workflows.quantize_checkpoint(tmp_path / "other", tmp_path / "out", ROUND)
    workflows.quantize_checkpoint(shards / "source", tmp_path / "out", ROUND, resume=False)
    assert files_of(tmp_path / "out") == files_of(shards / "whole")


def stop():
    raise KeyboardInterrupt
