"""Checks and times the products with quantized weights on an NVIDIA GPU, beside XLA's and the roofline.

    python benchmarks/device_gpu.py --out benchmarks/results

First every kernel is compared with float64 NumPy on fresh random data (`--seed`); then each product runs on enough
copies of its weight (512 MB and more) that none is found in a cache. One compiled program multiplies with all copies in
turn, so that the time of a call from Python counts little; medians of rounds, all waited for. The roofline is the time
in which the bytes could be copied at the bandwidth measured here, or the operations done at the chip's bfloat16 peak.
`error` is against dequantized weights in float32, relative to the largest result. Writes `device_gpu.json` and `.png`.
"""

import argparse
import functools
import itertools
import json
import math
import time
from pathlib import Path
from statistics import median

import environment
import jax
import jax.numpy as jnp
import matplotlib as mpl
import ml_dtypes
import numpy as np
from jax import lax

import jaxquant as jq
from jaxquant.kernels import mosaic_gpu_kernel, reference
from jaxquant.kernels.matmul import chosen, quantized_matmul
from jaxquant.kernels.tuning import GPU_CHIPS, GpuTiles, gpu_tiles

SHAPES = [(4096, 4096), (4096, 28672), (14336, 4096), (8192, 28672)]  # K, N
TOKENS = [1, 4, 16, 64, 256, 1024, 4096]
PEAK = {"h100": 989e12, "h200": 989e12}  # dense bfloat16 operations per second, from the data sheets of SXM boards
WEIGHTS = {
    "W4 g128": jq.int4(group_size=128),
    "W8": jq.int8(),
    "W8A8": jq.int8(activations=jq.ActivationSpec()),
}
CHECKED = {
    **{name: WEIGHTS[name] for name in ("W4 g128", "W8")},
    "W4 g128 asymmetric": jq.int4(group_size=128, symmetric=False),
    "W4 g64": jq.int4(group_size=64),
    "W4": jq.int4(),
    "W8 g128": jq.int8(group_size=128),
}
TOLERANCE = {"gpu": 1e-4, "cpu": 1e-2}  # of the largest result; on a CPU the definition runs, which rounds weights


def seconds(run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def typical(run, rounds: int, at_least: float = 0.02) -> float:
    """The median over rounds, each of so many calls that the clock and the call count little."""
    run(), seconds(run, 1)
    calls = max(1, math.ceil(at_least / seconds(run, 1)))
    return median(seconds(run, calls) for _ in range(rounds))


def measured_bandwidth(size: int, rounds: int) -> float:
    """Bytes per second that are read and written by a copy."""
    a = jnp.zeros(size // 4, jnp.int32)
    copy = jax.jit(lambda a: a ^ 1)
    return 2 * a.nbytes / typical(lambda: copy(a), rounds)


def measured_peak(n: int, rounds: int) -> float:
    """Operations per second of XLA's bfloat16 product of square matrices."""
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    square = jax.jit(jnp.matmul)
    return 2 * n**3 / typical(lambda: square(a, a), rounds)


def exact(x, q, pre_scaled: bool) -> np.ndarray:
    """The product in float64; where the kernel rounds scaled weights to the dtype of x, so does this."""
    codes, scale = (np.asarray(a, np.float64) for a in (q.codes, q.scale))
    zero = 0.0 if q.zero_point is None else np.asarray(q.zero_point, np.float64)
    scale, shift = (np.repeat(a, len(codes) // len(q.scale), 0) for a in (scale, scale * zero))
    w = codes * scale
    if pre_scaled:
        w = w.astype(ml_dtypes.bfloat16 if x.dtype == jnp.bfloat16 else np.float16).astype(np.float64)
    return np.asarray(x, np.float64) @ (w - shift)


def check(chip: str, seed: int, k: int, n: int, tokens) -> list[dict]:
    """Compares the kernel with float64, for every kind of weight; raises where they differ."""
    rows = []
    for name, spec in CHECKED.items():
        for dtype in (jnp.bfloat16, jnp.float16):
            keys = jax.random.split(jax.random.key(seed + len(rows)))
            w = jax.random.normal(keys[0], (k, n), dtype)
            q = jq.prepare(jq.quantize(w, spec), "gpu", chip)
            for m in tokens:
                x = jax.random.normal(keys[1], (m, k), dtype)
                run = functools.partial(
                    quantized_matmul, preferred_element_type=jnp.float32, implementation="mosaic_gpu"
                )
                found = np.asarray(jax.jit(run)(x, q), np.float64)
                tiles = gpu_tiles(chip, m, n)
                assert tiles is not None
                grouped = spec.group_size is not None
                want = exact(x, q, pre_scaled=grouped and tiles.tile_m >= 64)
                error = float(np.abs(found - want).max() / np.abs(want).max())
                rows.append({"weight": name, "dtype": dtype.__name__, "M": m, "error": error})
                if not error < TOLERANCE[jax.default_backend()]:
                    raise SystemExit(f"the kernel is wrong: {rows[-1]}")
    return rows


def batched_groups(x, q):
    """One product per group of input channels, as XLA fuses it for few tokens."""
    groups = len(q.scale)
    x = x.reshape(len(x), groups, -1).swapaxes(0, 1)
    w = q.prepared.integers(q.values, q.spec.bits).reshape(-1, groups, x.shape[-1]).astype(x.dtype)
    parts = lax.dot_general(x, w, (((2,), (2,)), ((0,), (1,))), preferred_element_type=jnp.float32)  # [G, M, N]
    return jnp.sum(parts * q.scale[:, None].astype(jnp.float32), 0).astype(x.dtype)


def dequantized(x, q):
    """Dequantize, then multiply."""
    return reference.matmul(x, q, None, None)


METHODS = {  # the kind of weight (None is bfloat16), the product, and the most tokens to run it with
    "bf16, XLA": (None, jnp.matmul, None),
    "W4 g128, XLA dequantized": ("W4 g128", dequantized, None),
    "W4 g128, XLA by group": ("W4 g128", batched_groups, 1),  # with 4 tokens, the compiler of JAX 0.11.2 aborts
    "W4 g128, jaxquant": ("W4 g128", quantized_matmul, None),
    "W8, XLA dequantized": ("W8", dequantized, None),
    "W8, jaxquant": ("W8", quantized_matmul, None),
    "W8A8, jaxquant": ("W8A8", quantized_matmul, None),
}


def copies_of(kind: str | None, k: int, n: int, chip: str | None, rotate: int) -> list:
    """Different weights of one kind, as many as take `rotate` bytes."""

    @jax.jit
    def make(key):
        w = jax.random.normal(key, (k, n), jnp.bfloat16)
        return w if kind is None else jq.quantize(w, WEIGHTS[kind])

    one = make(jax.random.key(0))
    lay = (lambda w: w) if kind is None else lambda q: jq.prepare(q, "gpu", chip)
    return [lay(make(jax.random.key(i))) for i in range(max(2, math.ceil(rotate / one.nbytes)))]


def in_turn(product, x, weights):
    """One program that multiplies with all of the weights; results are returned, so none is left out."""
    one = jax.jit(product)  # traced once
    run = jax.jit(lambda x, weights: [one(x, w) for w in weights])
    return lambda: run(x, weights)


def roofline(m: int, k: int, n: int, kind: str | None, bandwidth: float, peak: float) -> float:
    """The least seconds for the bytes and the operations, eight-bit ones at twice the rate."""
    bits, groups = (16, 0) if kind is None else (WEIGHTS[kind].bits, WEIGHTS[kind].num_groups(k))
    moved = k * n * bits / 8 + 2 * groups * n + 2 * m * k + 2 * m * n
    return max(moved / bandwidth, 2 * m * k * n / (2 * peak if kind == "W8A8" else peak))


def time_shape(k: int, n: int, args, chip, bandwidth, peak) -> list[dict]:
    rows = []
    by_kind: dict = {}
    for name, (kind, product, most) in METHODS.items():
        by_kind.setdefault(kind, []).append((name, product, most))
    for kind, products in by_kind.items():
        weights = copies_of(kind, k, n, chip, args.rotate)
        for m in args.tokens:
            x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
            dense = weights[0] if kind is None else jq.dequantize(weights[0], jnp.float32)
            want = jnp.matmul(x.astype(jnp.float32), dense.astype(jnp.float32), precision=lax.Precision.HIGHEST)
            bound = roofline(m, k, n, kind, bandwidth, peak)
            for name, product, most in products:
                if most is not None and m > most:
                    continue
                run = in_turn(product, x, weights)
                error = jnp.max(jnp.abs(run()[0].astype(jnp.float32) - want)) / jnp.max(jnp.abs(want))
                taken = typical(run, args.rounds) / len(weights)
                row = {"K × N": f"{k} × {n}", "M": m, "product": name, "µs": 1e6 * taken, "roofline µs": 1e6 * bound}
                row |= {"roofline / time": bound / taken, "error": float(error)}
                row["runs"] = chosen(x, weights[0]) if product is quantized_matmul else ""
                rows.append(row)
                print(line_of(row), flush=True)
    plain = {row["M"]: row["µs"] for row in rows if row["product"] == "bf16, XLA"}
    return [row | {"bf16 / time": plain[row["M"]] / row["µs"]} for row in rows]


def candidates(base: GpuTiles) -> list[GpuTiles]:
    """Tiles for as many tokens: of two and of four warpgroups, with other numbers of stages, shared and not."""
    cuts = {(128, 128), (base.tile_n, base.tile_k)}
    choices = itertools.product(sorted(cuts), (4, 6, 8, 10), (False, True))
    return [GpuTiles(base.tile_m, n, k, stages, split) for (n, k), stages, split in choices]


def time_candidates(k: int, n: int, args, chip: str) -> list[dict]:
    """Other tiles than the table's, for four-bit weights."""
    rows = []
    weights = copies_of("W4 g128", k, n, chip, args.rotate)
    for m in (m for m in args.tokens if m <= 512):
        x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
        base = gpu_tiles(chip, m, n)
        assert base is not None
        for tiles in candidates(base):

            def product(x, q, tiles=tiles):
                return mosaic_gpu_kernel.product(
                    x, q.prepared.integers(q.values, q.spec.bits), q.scale, tiles, GPU_CHIPS[chip], x.dtype
                )

            taken = typical(in_turn(product, x, weights), args.rounds) / len(weights)
            rows.append({"K × N": f"{k} × {n}", "M": m, "tiles": str(tiles), "µs": 1e6 * taken})
            print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: dict) -> str:
    return f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v) for v in row.values())} |"


def table(rows: list[dict]) -> str:
    return "\n".join([f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}", *map(line_of, rows)])


def speeds(rows: list[dict]) -> list[dict]:
    """A row for each product of a shape, a column for each number of tokens: µs, and how often that is in bf16's."""
    tokens = sorted({row["M"] for row in rows})
    found: dict = {}
    for row in rows:
        cells = {"K × N": row["K × N"], "product": row["product"], **{f"M = {m}": "–" for m in tokens}}
        line = found.setdefault((row["K × N"], row["product"]), cells)
        line[f"M = {row['M']}"] = f"{row['µs']:.3g} ({row['bf16 / time']:.2f}x)"
    return [*found.values()]


def plot(rows: list[dict], title: str, file: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(row["K × N"] for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4.5), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        here = [row for row in rows if row["K × N"] == shape]
        for i, name in enumerate(dict.fromkeys(row["product"] for row in here)):
            line = [(row["M"], row["µs"], row["roofline µs"]) for row in here if row["product"] == name]
            m, taken, bound = zip(*line, strict=True)
            axis.plot(m, taken, "o-", color=f"C{i}", label=name, markersize=3)
            axis.plot(m, bound, ":", color=f"C{i}", linewidth=1)
        axis.set(title=f"K × N = {shape}", xlabel="tokens", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("µs; dotted: roofline")
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(args) -> None:
    if jax.default_backend() != "gpu" and not args.smoke:
        raise SystemExit("there is no GPU here: nothing was timed")
    device = jax.devices()[0]
    chip = "h200" if args.smoke else environment.chip()
    check_shape = (256, 128) if args.smoke else (2048, 1024)
    print(environment.line() + "\n")
    checks = [] if chip is None else check(chip, args.seed, *check_shape, args.checked)
    if checks:
        worst = max(row["error"] for row in checks)
        print(f"{len(checks)} products checked against float64: largest error {worst:.2g}\n", flush=True)
    bandwidth = measured_bandwidth(2**20 if args.smoke else 2**31, args.rounds)
    reached = measured_peak(256 if args.smoke else 8192, args.rounds)
    peak = PEAK.get(chip or "", reached)
    about = {"copy TB/s": bandwidth / 1e12, "bf16 TFLOP/s, XLA": reached / 1e12, "bf16 TFLOP/s, peak": peak / 1e12}
    print(" · ".join(f"{name} {value:.4g}" for name, value in about.items()) + "\n", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {**environment.describe(), **about, "checks": checks, "rows": [], "candidates": []}
    for k, n in args.shapes:
        found["rows"] += time_shape(k, n, args, chip, bandwidth, peak)
        if args.candidates and chip is not None:
            found["candidates"] += time_candidates(k, n, args, chip)
        (args.out / "device_gpu.json").write_text(json.dumps(found, indent=1) + "\n")  # of all that is done
        plot(found["rows"], f"{device.device_kind}, {about['copy TB/s']:.3g} TB/s copied", args.out / "device_gpu.png")
    print("\n\n".join(["", *(table(rows) for rows in (speeds(found["rows"]), found["candidates"]) if rows)]))


def shape(text: str) -> tuple[int, int]:
    k, n = map(int, text.split("x"))
    return k, n


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s")
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="KxN")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="M")
    parser.add_argument("--checked", type=int, nargs="+", default=[1, 3, 16, 17, 64, 100, 256, 512], metavar="M")
    parser.add_argument("--rotate", type=int, default=512 * 10**6, metavar="BYTES", help="of weights, in turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the checks; default: the clock")
    parser.add_argument("--candidates", action="store_true", help="also time other tiles than the table's")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)  # tiny, on any machine: a test
    main(parser.parse_args())
