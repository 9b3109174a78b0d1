"""Products with quantized weights on a CPU beside the float32 dot, in one run.

    python benchmarks/matmul_cpu.py [--size 4096] [--rounds 9] [--out benchmarks/results/matmul_cpu.json]

For 1, 2, 16 and 128 rows of float32 inputs and a square weight: the float dot, and the same product with 8- and 4-bit
weights as they are ("plain") and prepared for a CPU (`jq.prepare`). All programs take turns; the numbers are medians,
and how many float32 dots long they are. The last column is the largest error of a row, relative to its largest entry,
against float64.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import environment
import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.kernels.matmul import chosen, quantized_matmul

ROWS = (1, 2, 16, 128)
A8 = jq.ActivationSpec()
SPECS = {
    "W8A8": jq.int8(activations=A8),
    "W4A8": jq.int4(activations=A8),
    "W8A16": jq.int8(),
    "W4A16": jq.int4(),
    "W8A16 g128": jq.int8(group_size=128),
    "W4A16 g128": jq.int4(group_size=128),
}


def error(found: jax.Array, x: jax.Array, q: jq.QTensor) -> float | None:
    """Against float64, where inputs are not rounded."""
    if q.spec.activations is not None:
        return None
    want = np.asarray(x, np.float64) @ np.asarray(jq.dequantize(q), np.float64)
    return float((np.abs(np.asarray(found, np.float64) - want).max(-1) / np.abs(want).max(-1)).max())


def race(size: int, rounds: int) -> list[dict]:
    keys = jax.random.split(jax.random.key(0), 2)
    w = jax.random.normal(keys[0], (size, size)) / size**0.5
    rows = []
    for count in ROWS:
        x = jax.random.normal(keys[1], (count, size))
        given = {"float32": w} | {name: jq.quantize(w, spec) for name, spec in SPECS.items()}
        given |= {f"{name}, prepared": jq.prepare(given[name], "cpu") for name in SPECS}
        multiply = {n: jnp.matmul if n == "float32" else quantized_matmul for n in given}
        programs = {n: jax.jit(multiply[n]).lower(x, a).compile() for n, a in given.items()}
        results = {n: jax.block_until_ready(programs[n](x, a)) for n, a in given.items()}
        seconds: dict[str, list[float]] = {n: [] for n in given}
        for _ in range(rounds):
            for n, a in given.items():
                start = time.perf_counter()
                jax.block_until_ready(programs[n](x, a))
                seconds[n].append(time.perf_counter() - start)
        for n, a in given.items():
            quantized = n != "float32"
            rows.append({
                "rows": count,
                "product": n,
                "implementation": chosen(x, a) if quantized else "dot",
                "ms": 1e3 * median(seconds[n]),
                "÷ float32": median(seconds[n]) / median(seconds["float32"]),
                "error": error(results[n], x, a) if quantized else None,
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Float32 dots that a product takes, plain and prepared, by rows."""
    cells = {(row["product"], row["rows"]): row for row in rows}
    lines = ["| | " + " | ".join(f"{n} rows" for n in ROWS) + " | error |", "|---" * (len(ROWS) + 2) + "|"]
    for name in ("float32", *SPECS, *(f"{name}, prepared" for name in SPECS)):
        ratios = [f"{cells[name, n]['÷ float32']:.2f} ({cells[name, n]['ms']:.1f} ms)" for n in ROWS]
        worst = [cells[name, n]["error"] for n in ROWS if cells[name, n]["error"] is not None]
        lines.append(f"| {name} | " + " | ".join(ratios) + f" | {f'{max(worst):.1e}' if worst else '–'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    measured = race(options.size, options.rounds)
    print(f"\n{environment.line()}, {options.size}×{options.size}\n\n{table(measured)}")
    if options.out:
        options.out.write_text(json.dumps({**environment.describe(), "rows": measured}, indent=1) + "\n")
