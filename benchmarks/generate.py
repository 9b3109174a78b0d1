"""Tokens per second and bytes of generation with float, int8 and int4 weights and caches.

    python benchmarks/generate.py [--model DIR] [--dtype D] [--unstacked] [--caches NAME ...] [--batch 1 8]
        [--out FILE]

One prompt of 128 tokens for each sequence of a batch, 128 new tokens, greedily; all in one process, in turn; the first
round of each compiles and is not counted. "prefill" are the tokens of the prompts per second, "decode" the new ones.
Weights are rounded to nearest and prepared for this platform; groups of 128. The cache has room for 256 tokens.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import environment
import jax
import numpy as np

import jaxquant as jq

WEIGHTS = {"float": None, "int8": jq.int8(group_size=128), "int4": jq.int4(group_size=128)}
CACHES = {
    "float": jq.CacheSpec(),
    "int8": jq.CacheSpec(8),
    "int4": jq.CacheSpec(4),
    "int4, keys per channel, 32 newest float": jq.CacheSpec(4, keys="per_channel", residual=32),
}
LENGTH = 128
ROUNDS = 5


def seconds(model, params, prompts, cache) -> tuple[float, float]:
    """Medians of a run of one token, and of what the others take."""
    times = {1: [], LENGTH: []}
    for _ in range(ROUNDS + 1):
        for count, found in times.items():
            start = time.perf_counter()
            jq.generate(model, params, prompts, max_new_tokens=count, cache=cache)
            found.append(time.perf_counter() - start)
    first, all_of_them = (statistics.median(found[1:]) for found in times.values())
    return first, all_of_them - first


def measure(name: str, dtype: str, stacked: bool, caches: list[str], sizes: list[int]) -> list[dict]:
    model, params = jq.load_pretrained(name, dtype=dtype, stacked=stacked)
    rng = np.random.default_rng(0)
    rows = []
    for weights, spec in WEIGHTS.items():
        tree = params
        if spec is not None:
            tree, _ = jq.quantize_params(params, None, model.recipe(jq.RTN(spec)))
            tree = jq.prepare(tree, jax.default_backend(), environment.chip())
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree["layers"]))
        for cache in caches:
            how = CACHES[cache]
            for batch in sizes:
                prompts = rng.integers(0, model.config.vocab_size, (batch, LENGTH)).tolist()
                prefill, decode = seconds(model, tree, prompts, how)
                past = jax.eval_shape(
                    lambda how=how, batch=batch: model.empty_past(how, np.zeros(batch, np.int32), 256)
                )
                held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(past.cache))
                row = {"weights": weights, "cache": cache, "batch": batch, "weight bytes": nbytes, "cache bytes": held}
                row |= {"prefill": batch * LENGTH / prefill, "decode": batch * (LENGTH - 1) / decode}
                print(row, flush=True)
                rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| weights | cache | batch | layers' MB | cache MB | prefill, tokens/s | decode, tokens/s |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        sizes = f"{row['weight bytes'] / 1e6:.2f} | {row['cache bytes'] / 1e6:.3f}"
        speeds = f"{row['prefill']:.0f} | {row['decode']:.0f}"
        lines.append(f"| {row['weights']} | {row['cache']} | {row['batch']} | {sizes} | {speeds} |")
    return f"{environment.line()}\n\n" + "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tinylm", help="directory of a checkpoint (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the activations and what is not quantized")
    parser.add_argument(
        "--unstacked", action="store_true", help="each layer has arrays of its own, and none is cut out"
    )
    parser.add_argument("--caches", nargs="+", choices=list(CACHES), default=list(CACHES), metavar="NAME")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences that run together")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    rows = measure(options.model, options.dtype, not options.unstacked, options.caches, options.batch)
    print("\n" + table(rows))
    if options.out:
        caches = {name: dataclasses.asdict(how) for name, how in CACHES.items()}
        options.out.write_text(json.dumps({**environment.describe(), "caches": caches, "rows": rows}, indent=1) + "\n")
