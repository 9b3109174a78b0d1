"""Trains rounded weights of the packaged model on text that the model wrote itself (LLM-QAT).

    python benchmarks/own_text.py --work FOLDER [--settings NAME ...] [--sequences N]

FOLDER is the one of `benchmarks/quality_peer.py`, whose checkpoints with learned rounding are the start, and which
evaluates the one that is written beside them. A few of its calibration tokens begin each sequence, the float model goes
on, sampled as it is; the loss is the divergence from it (`benchmarks/qat.py`). That text is as much as is asked for,
where the calibration text alone would be learned by heart. Of the rates of learning, the one is kept that does best on
sequences that were not trained on. Text and checkpoints are kept, and not made again. Liu et al., LLM-QAT, 2023,
https://arxiv.org/abs/2305.17888.
"""

import argparse
import dataclasses
import os
from pathlib import Path

import environment
import jax
import jax.numpy as jnp
import numpy as np
import qat
from settings import LEARNED, SPECS, TOKENS, TRAINED, checkpoint, model_to_train

import jaxquant as jq
from jaxquant.numerics.qtensor import is_qtensor

RATES = {4: (1e-4, 2e-4), 3: (2e-4, 4e-4), 2: (5e-4, 1e-3)}  # by bits
LENGTH, BATCH = 256, 8
START = 8  # tokens of calibration text that a sequence begins with
TOGETHER = 1024  # sequences
VALIDATION = 256  # sequences
STORED = "float16"  # as the packaged model is, so that files are as large


def written(model, params, samples: np.ndarray, sequences: int, seed: int) -> np.ndarray:
    """Token ids `[sequences, LENGTH]` that the model writes."""
    rng = np.random.default_rng(seed)
    rows = samples[rng.integers(0, len(samples), sequences)]
    at = rng.integers(0, rows.shape[1] - START, (sequences, 1))
    starts = np.take_along_axis(rows, at + np.arange(START), 1).tolist()
    new = LENGTH - START
    text = jq.generate(model, params, starts, max_new_tokens=new, sampling=jq.Sampling(1.0), seed=seed)
    return np.asarray([start + more for start, more in zip(starts, text, strict=True)], np.int32)


def own_text(model, params, samples: np.ndarray, sequences: int, file: Path) -> np.ndarray:
    """That text, and as much more for validation; what is in the file is not written again."""
    found = np.load(file) if file.exists() else np.zeros((0, LENGTH), np.int32)
    while len(found) < sequences + VALIDATION:
        found = np.concatenate([found, written(model, params, samples, TOGETHER, len(found))])
        unfinished = file.with_suffix(".new.npy")
        np.save(unfinished, found)
        os.replace(unfinished, file)
        print(f"{len(found)} sequences", flush=True)
    return found[: sequences + VALIDATION]


def cast(tree, dtype: str):
    """A tree whose float arrays, and what its quantized weights stand for, are of a dtype."""

    def one(leaf):
        leaf = dataclasses.replace(leaf, dtype=dtype) if is_qtensor(leaf) else leaf
        return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, leaf)

    return jax.tree.map(one, tree, is_leaf=is_qtensor)


def train(name: str, model, params, text: np.ndarray, work: Path) -> None:
    """Writes the checkpoint of a setting, unless it is there."""
    out, spec = checkpoint(work, name, TRAINED), SPECS[name]
    if out.exists():
        return
    _, start = jq.load_pretrained(checkpoint(work, name, LEARNED), dtype="float32")
    text, unseen = text[VALIDATION:], text[:VALIDATION]
    data = text[: len(text) // BATCH * BATCH].reshape(-1, BATCH, LENGTH)

    def divergence(tree, what: str) -> float:
        kl = jq.compare(model.apply, tree, params, unseen.reshape(-1), context=LENGTH).kl.mean
        print(f"{name}, {what}: KL {kl:.5f} on text that was not trained on", flush=True)
        return kl

    divergence(start, "learned rounding")
    found = {}
    for rate in RATES[spec.bits]:
        tree = cast(qat.trained(model, params, cast(start, "float32"), spec, rate, data, None)[0], STORED)
        found[divergence(tree, f"{len(data)} steps at {rate:g}")] = tree
    jq.save(out, model, found[min(found)], format="compressed-tensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of quality_peer.py")
    parser.add_argument("--settings", nargs="+", choices=list(SPECS), default=list(SPECS))
    parser.add_argument("--sequences", type=int, default=16384, help=f"of {LENGTH} tokens (default: %(default)s)")
    args = parser.parse_args()
    print(environment.line(), flush=True)
    model, params = model_to_train()
    samples = np.load(args.work / TOKENS)
    text = own_text(model, params, samples, args.sequences, args.work / "own_text.npy")
    for name in args.settings:
        train(name, model, params, text, args.work)


if __name__ == "__main__":
    main()
