"""What a GPTQ solve costs, against the arithmetic that the paper's formulation cannot do without.

    python benchmarks/gptq_time.py --sizes 1024 4096 --json gptq_time.json

The floor of a K×K weight is one Cholesky factorization, one triangular inverse, and half of one K×K×K product, each
alone and compiled. jaxquant needs no inverse, so it may go below. Everything runs in turn, in one process: medians of
seconds, and medians of the rounds' ratios. The last table solves one stack of matrices with vmap, and one by one.
"""

import argparse
import functools
import json
import time
from statistics import median

import environment
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

import jaxquant as jq
from jaxquant.numerics.statistics import InputStatistics


def seconds(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def problem(*shape):
    """Weights `[*lead, K, K]` and statistics of correlated inputs."""
    k = shape[-1]
    keys = jax.random.split(jax.random.key(0), 3)
    mix = jnp.eye(k) + 0.3 * jax.random.normal(keys[0], (k, k)) / np.sqrt(k)
    x = jax.random.normal(keys[1], (2 * k, k)) @ mix
    gram = jnp.broadcast_to(x.T @ x / (2 * k), (*shape[:-2], k, k))
    channels, count = jnp.zeros(gram.shape[:-1]), jnp.full(gram.shape[:-2], 2.0 * k)
    stats = InputStatistics(gram, channels, channels, count, 0 * count, channels[..., None, :])
    return jax.random.normal(keys[2], shape), stats


def floor(w, gram) -> dict:
    """The three parts of the floor, compiled and run once."""
    k = w.shape[0]
    damped = gram + 0.01 * jnp.eye(k)
    lower = jnp.linalg.cholesky(damped)
    parts = {
        "cholesky": (functools.partial(jnp.linalg.cholesky, symmetrize_input=False), (damped,)),
        "inverse": (lambda a: solve_triangular(a, jnp.eye(k), lower=True), (lower,)),
        "products": (functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST), (gram[:, : k // 2], w[: k // 2])),
    }
    runs = {name: functools.partial(jax.jit(f), *args) for name, (f, args) in parts.items()}
    jax.block_until_ready([run() for run in runs.values()])
    return runs


def solve_row(k: int, config, rounds: int) -> dict:
    w, stats = problem(k, k)
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(config.quantize).lower(w, stats)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    runs = {**floor(w, stats.gram), "run": lambda: compiled(w, stats)}
    seconds(runs["run"])
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(rounds)]
    row = {"size": k, "lower": middle - start, "compile": end - middle}
    row |= {name: median(t[name] for t in times) for name in runs}
    row["run / floor"] = median(t["run"] / (t["cholesky"] + t["inverse"] + t["products"]) for t in times)
    row["HLO lines"] = len(lowered.as_text().splitlines())
    row["peak MiB"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return row


def stack_row(count: int, k: int, config, rounds: int) -> dict:
    w, stats = problem(count, k, k)
    one, stack = jax.jit(config.quantize), jax.jit(jax.vmap(config.quantize))
    matrices = [(w[i], jax.tree.map(lambda a, i=i: a[i], stats)) for i in range(count)]
    runs = {"vmap": lambda: stack(w, stats), "one by one": lambda: [one(*matrix) for matrix in matrices]}
    for run in runs.values():
        seconds(run)
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(rounds)]
    row = {"size": f"{count} × {k}"} | {name: median(t[name] for t in times) for name in runs}
    row["vmap / one by one"] = median(t["vmap"] / t["one by one"] for t in times)
    return row


def table(rows: list[dict]) -> str:
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells])


def main(args) -> None:
    config = jq.GPTQ(jq.int4(group_size=args.group_size), act_order=not args.no_act_order)
    solves = [solve_row(k, config, args.rounds) for k in args.sizes]
    stacks = [stack_row(*args.stack, config, args.rounds)]
    print(f"{environment.line()}\n\n{config}, seconds\n\n{table(solves)}\n\n{table(stacks)}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {**environment.describe(), "config": str(config), "solves": solves, "stacks": stacks}, file, indent=1
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096], help="K of K×K weights")
    parser.add_argument("--stack", type=int, nargs=2, default=[32, 1024], metavar=("COUNT", "K"))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--no-act-order", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    main(parser.parse_args())
