"""What a GPTQ solve costs, against the arithmetic that it cannot do without and against llm-compressor.

    python benchmarks/gptq_time.py --sizes 1024 4096 --peer PYTHON --json gptq_time.json

The floor of a K×K weight is one Cholesky factorization, one triangular inverse, and half of one K×K×K product, each
alone and compiled. jaxquant needs no inverse, so it may go below. Everything runs in turn: medians of seconds, and
medians of the rounds' ratios. PYTHON is the interpreter of an environment with llm-compressor, which solves the same
problem in a process beside this one; it waits while this one works. The errors are trace(Δᵀ·gram·Δ), of both with the
same damping. Pin all of it to one core (`taskset -c 0`) for equal threads. The last table solves one stack of matrices
with vmap, and one by one.
"""

import argparse
import contextlib
import functools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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


@contextlib.contextmanager
def peer_solver(python: str, config, w, gram) -> Iterator[Callable[[], dict]]:
    """Yields a function that lets llm-compressor solve the problem: its seconds and its output error."""
    script = Path(__file__).parent / "peers" / "llmcompressor_solve.py"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.npz"
        np.savez(file, w=np.ascontiguousarray(np.asarray(w).T), gram=np.asarray(gram))
        command = [python, script, file, str(config.spec.group_size), str(int(config.act_order))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, text=True, bufsize=1, **pipes) as process:

            def answer():
                while not (text := process.stdout.readline()).startswith("{"):  # its log
                    if not text:
                        raise RuntimeError(f"{command} ended; run it by hand to see why")
                return json.loads(text)

            def solve():
                process.stdin.write("solve\n")
                return answer()

            print(f"llm-compressor: {answer()}", flush=True)
            yield solve


def output_error(w, q, gram) -> float:
    """trace(Δᵀ·gram·Δ) in float64."""
    error = np.asarray(jq.dequantize(q), np.float64) - np.asarray(w)
    return float(np.sum(error * (np.asarray(gram, np.float64) @ error)))


def compiled_solve(config, w, stats) -> tuple[Callable, dict]:
    """The compiled solve, and what it took to make it."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(config.quantize).lower(w, stats)
    middle = time.perf_counter()
    compiled = lowered.compile()
    facts = {"lower": middle - start, "compile": time.perf_counter() - middle}
    facts["HLO lines"] = len(lowered.as_text().splitlines())
    facts["peak MiB"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return compiled, facts


def solve_row(k: int, config, rounds: int) -> dict:
    w, stats = problem(k, k)
    compiled, facts = compiled_solve(config, w, stats)
    runs = {**floor(w, stats.gram), "run": lambda: compiled(w, stats)}
    seconds(runs["run"])
    times = [{name: seconds(run) for name, run in runs.items()} for _ in range(rounds)]
    row = {"size": k, **facts} | {name: median(t[name] for t in times) for name in runs}
    row["run / floor"] = median(t["run"] / (t["cholesky"] + t["inverse"] + t["products"]) for t in times)
    return row


def peer_row(python: str, k: int, config, rounds: int) -> dict:
    w, stats = problem(k, k)
    ours = jax.jit(config.quantize)
    with peer_solver(python, config, w, stats.gram) as theirs:
        q, _ = ours(w, stats)
        theirs()
        times = [(seconds(lambda: ours(w, stats)), theirs()) for _ in range(rounds)]
    row = {"size": k, "jaxquant": median(a for a, _ in times), "llm-compressor": median(b["seconds"] for _, b in times)}
    row["llm-compressor / jaxquant"] = median(b["seconds"] / a for a, b in times)
    row["error, jaxquant"] = output_error(w, q, stats.gram)
    row["error, llm-compressor"] = times[-1][1]["error"]
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
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(rows[0]), ["---"] * len(rows[0]), *cells])


def main(args) -> None:
    config = jq.GPTQ(jq.int4(group_size=args.group_size), act_order=not args.no_act_order)
    tables = {"solves": [solve_row(k, config, args.rounds) for k in args.sizes]}
    if args.peer:
        tables["peer"] = [peer_row(args.peer, k, config, args.rounds) for k in args.sizes]
    tables["stacks"] = [stack_row(*args.stack, config, args.rounds)]
    print(f"\n{environment.line(args.peer)}\n\n{config}, seconds\n\n" + "\n\n".join(map(table, tables.values())))
    if args.json:
        about = environment.describe(args.peer)
        args.json.write_text(json.dumps({**about, "config": str(config), **tables}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096], help="K of K×K weights")
    parser.add_argument("--stack", type=int, nargs=2, default=[32, 1024], metavar=("COUNT", "K"))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--no-act-order", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter that has llm-compressor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    main(parser.parse_args())
