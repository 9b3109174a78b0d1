"""The packaged model at 4 bits by every tool that runs here: loss, seconds, memory and bytes, side by side in one run.

    python benchmarks/compare.py [--llmcompressor PYTHON] [--torch PYTHON] [--qwix PYTHON]
        [--out benchmarks/results/compare.json] [--plot benchmarks/results/compare.png]

Each PYTHON is the interpreter of an environment that has llm-compressor, optimum-quanto and torchao, or qwix; rows of
those that are not given are left out. Weights of all linear layers but the head get 4 bits in groups of 128, symmetric
where the tool has a choice. Methods that calibrate read the same tokens. All evaluate the same held-out windows in
float32: checkpoints by transformers, the others by their own tool. The increase of the loss is in nats per token, with
the standard error of the paired difference; seconds are of the process without imports and evaluation, compilation
included; memory is the peak resident set until then.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

import environment
import numpy as np
import torch
from end_to_end import JAXQUANT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from quality_peer import estimate, losses
from transformers.utils import logging

from jaxquant import pretrained, workflows
from jaxquant.models import TINYLM

SAMPLES, WINDOWS, LENGTH = 128, 64, 512
PEERS = Path(__file__).parent / "peers"
FLAGS = {
    "RTN": ["--method", "rtn"],
    "AWQ": ["--method", "awq"],
    "GPTQ": ["--method", "gptq"],
    "GPTQ refined": ["--method", "gptq", "--clip", "diagonal", "--refine", "6"],
    "AWQ + GPTQ refined": ["--method", "awq+gptq", "--clip", "diagonal", "--refine", "6"],
}


def commands(pythons: dict[str, str | None], folder: Path) -> dict[tuple[str, str], list]:
    """By tool and method. Each makes `folder/TOOL METHOD`: a checkpoint, or the losses as a file that ends in .npy."""
    tokens, windows = folder / "tokens.npy", folder / "windows.npy"
    data = ["--calibration", tokens, "--num-samples", SAMPLES, "--seq-len", LENGTH, "--format", "compressed-tensors"]
    made = {
        ("jaxquant", method): [sys.executable, "-c", JAXQUANT, "quantize", TINYLM, *flags, *data, "--out"]
        for method, flags in FLAGS.items()
    }
    if python := pythons["llmcompressor"]:
        oneshot = [python, PEERS / "llmcompressor_oneshot.py", TINYLM, tokens]
        made[("llm-compressor", "AWQ")] = oneshot
        made[("llm-compressor", "GPTQ")] = oneshot
    if python := pythons["torch"]:
        for tool in ("optimum-quanto", "torchao"):
            made[(tool, "RTN")] = [python, PEERS / "torch_ptq.py", tool, TINYLM, windows]
    if python := pythons["qwix"]:
        made[("qwix", "RTN")] = [python, PEERS / "qwix_ptq.py", windows]
    return made


def measure(pythons: dict[str, str | None]) -> list[dict]:
    text = workflows.TextSource("tinylm")
    model, _ = pretrained.load_pretrained("tinylm")
    windows = text.corpus("held_out", WINDOWS * LENGTH).astype(np.int64).reshape(-1, LENGTH)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "windows.npy", windows)
        np.save(folder / "tokens.npy", workflows.calibration_samples(model, text, None, SAMPLES, LENGTH).tokens)
        floats = losses(TINYLM, torch.from_numpy(windows))
        for (tool, method), command in commands(pythons, folder).items():
            writes = tool in ("jaxquant", "llm-compressor")
            out = folder / f"{tool} {method}{'' if writes else '.npy'}"
            settings = [json.dumps({"method": method.lower()})] if tool == "llm-compressor" else []
            spent = environment.run([*command, out, *settings])
            found = losses(out, torch.from_numpy(windows)) if writes else np.load(out)
            mean, stderr = estimate(found - floats)
            version = spent.get("version") or metadata.version("jaxquant")
            row = {"tool": tool, "version": version, "method": method, "increase": mean, "stderr": stderr}
            rows.append({**row, "seconds": spent["seconds"], "peak MiB": spent["peak"]})
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| tool | method | loss increase | seconds | peak MiB |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['tool']} {r['version']} | {r['method']} | {r['increase']:.4f} ± {r['stderr']:.4f} | {r['seconds']:.1f} "
        f"| {r['peak MiB']:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def plot(rows: list[dict], file: Path) -> None:
    """Loss against seconds; left and low is good."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for tool in dict.fromkeys(row["tool"] for row in rows):
        own = [row for row in rows if row["tool"] == tool]
        seconds, increases = ([row[key] for row in own] for key in ("seconds", "increase"))
        axes.errorbar(seconds, increases, [row["stderr"] for row in own], fmt="o", capsize=3, label=tool)
        for i, row in enumerate(own):
            place = row["seconds"], row["increase"]
            axes.annotate(row["method"], place, (5, -12 if i % 2 else 5), textcoords="offset points")
    most = max(row["seconds"] for row in rows)
    axes.set(xscale="log", xlabel="seconds to quantize, compilation included", ylim=(0, None), xlim=(None, 2.5 * most))
    axes.set(ylabel="loss increase, nats per token", title="the packaged model at 4 bits, groups of 128")
    axes.legend()
    FigureCanvasAgg(figure).print_png(os.fspath(file))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("llmcompressor", "torch", "qwix"):
        parser.add_argument(f"--{name}", metavar="PYTHON")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    parser.add_argument("--plot", type=Path, help="also draw them, into a PNG file")
    options = vars(parser.parse_args())
    out, drawn = options.pop("out"), options.pop("plot")
    warnings.simplefilter("ignore")  # torch's and compressed-tensors' own deprecations
    logging.disable_progress_bar()
    rows = measure(options)
    print(f"\n{environment.line()}\n\n{table(rows)}")
    if out:
        out.write_text(json.dumps({**environment.describe(), "rows": rows}, indent=1) + "\n")
    if drawn:
        plot(rows, drawn)
