"""Runs in processes of their own, which are killed."""

import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PRELOADED = ["jaxquant.workflows"]  # JAX must be imported, but not yet used, in the process that is forked
WATCHED = ("mkdir", "rmdir", "unlink", "replace", "rename", "fsync", "chmod")


def processes():
    """Starts processes quickly: they are forked from one that has imported what they need and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def kill_before(nth: int):
    """Kills this process before the nth call of a function that changes the disk."""
    calls = itertools.count(1)

    def watched(function):
        def call(*args, **kwargs):
            if next(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in WATCHED:
        setattr(os, name, watched(getattr(os, name)))


def write_parts(out: Path, nth: int | None = None):
    """Writes a checkpoint of three parts, each of which depends on the state that the one before it has left."""
    from jaxquant.checkpoints.resumable import resumable_directory

    if nth is not None:
        kill_before(nth)
    with resumable_directory(out, {"model": "m"}, overwrite=True) as run:
        for i in range(len(run.notes), 3):
            state = run.state()["x"] if i else np.arange(4.0)

            def write(directory, i=i, state=state):
                save_file({f"w{i}": state}, directory / "any.safetensors")
                return {"sum": float(state.sum())}

            run.add(write, {"x": state * 3 + i} if i < 2 else None)
        run.index()
        (run.directory / "config.json").write_text(json.dumps(run.notes))


def quantize(model: Path, out: Path, tokens: Path, cache: str, started=None):
    """Quantizes a checkpoint; `started` is told when the first layer is calibrated."""
    import jax

    from jaxquant import workflows
    from jaxquant.methods.gptq import GPTQ
    from jaxquant.numerics.spec import int4

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def progress(what, done, total):
        if started is not None and what == "quantizing":
            started.send(done)

    config, files = GPTQ(int4(group_size=8)), {"calibration": str(tokens), "num_samples": 4, "seq_len": 16}
    report = workflows.quantize_checkpoint(str(model), str(out), config, **files, progress=progress)
    rows = [{**row, "seconds": 0} for row in report.to_dict()["layers"]]
    Path(f"{out}.report.json").write_text(json.dumps({**report.to_dict(), "layers": rows}))
