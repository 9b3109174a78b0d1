"""Asks the TPU's compiler how many cycles products take, on a machine without a TPU, beside the roofline.

    pip install 'jaxquant[tpu-aot]'
    python benchmarks/tpu_cycles.py --out benchmarks/results/tpu_cycles.json

Nothing runs on a TPU: the estimates are static. They serve to rank tiles. For memory they assume up to a third more
bandwidth than the chips have, so what is compared with the roofline is no less than it. It fails where W4A16 for 16
tokens on v5e is estimated to take more than 1.3 times the roofline.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import environment
import tpu_compiler


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks by the vendor's data sheets, and the clock that follows from them and the size of the matrix units."""

    hertz: float
    bytes_per_second: float
    flops: float  # bfloat16; twice as many with int8


CHIPS = {"v5e": Chip(1.5e9, 819e9, 197e12), "v6e": Chip(1.75e9, 1640e9, 918e12)}
WEIGHTS = {
    "W4A16 g128": {"bits": 4, "group": 128},
    "W4A16": {"bits": 4},
    "W8A16": {"bits": 8},
    "W8A8": {"bits": 8, "rounded": True},
    "W4A8 g128": {"bits": 4, "group": 128, "rounded": True},
}
SQUARE = [(m, 4096, 4096, kind) for kind in WEIGHTS for m in (1, 16, 64, 512)]
OTHERS = [(16, k, n, "W4A16 g128") for k, n in ((14336, 4096), (4096, 14336), (8192, 28672))]
TARGET = {"chip": "v5e", "kernel": "W4A16 g128", "M × K × N": "16 × 4096 × 4096"}, 1.3


def roofline(chip: Chip, m: int, k: int, n: int, weight: dict) -> tuple[float, str]:
    """The least seconds, and what limits them: inputs and results in bfloat16, scales too."""
    groups = k // weight.get("group", k)
    memory = (k * n * weight["bits"] / 8 + 2 * (groups * n + m * k + m * n)) / chip.bytes_per_second
    compute = 2 * m * k * n / chip.flops / (2 if weight.get("rounded") else 1)
    return max((memory, "memory"), (compute, "compute"))


def rows_of(name: str) -> list[dict]:
    """All products on one chip, in a process of its own: the compiler writes estimates to one folder per process."""
    with tempfile.TemporaryDirectory() as folder:
        device, rows = tpu_compiler.device_of(name, Path(folder)), []
        for m, k, n, kind in SQUARE + OTHERS:
            tpu_compiler.compiled(device, name, m, k, n, **WEIGHTS[kind])
            estimate = tpu_compiler.cycles_in(Path(folder)) / CHIPS[name].hertz
            least, limit = roofline(CHIPS[name], m, k, n, WEIGHTS[kind])
            row = {"chip": name, "kernel": kind, "M × K × N": f"{m} × {k} × {n}"}
            row |= {"estimate, µs": round(estimate * 1e6, 1), "roofline, µs": round(least * 1e6, 1), "limit": limit}
            rows.append(row | {"ratio": round(max(estimate, least) / least, 2)})
            print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
        return rows


def main(args) -> None:
    about = environment.describe() | {"libtpu": importlib.metadata.version("libtpu")}
    print(f"{environment.line()} · libtpu {about['libtpu']}\n")
    header = "chip", "kernel", "M × K × N", "estimate, µs", "roofline, µs", "limit", "ratio"
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    rows = []
    for name in CHIPS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows += process.submit(rows_of, name).result()
    if args.out is not None:
        args.out.write_text(json.dumps({"environment": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    what, most = TARGET
    if bad := [row for row in rows if what.items() <= row.items() and row["ratio"] > most]:
        raise SystemExit(f"more than {most} times the roofline: {bad}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where to store the rows as JSON")
    main(parser.parse_args())
