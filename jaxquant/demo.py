"""The packaged model, quantized by every method at every width: a table, and two plots."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxquant import pretrained, workflows
from jaxquant.evaluation.metrics import compare
from jaxquant.methods.awq import AWQ
from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.llm_int8 import LLMInt8
from jaxquant.methods.rtn import RTN
from jaxquant.methods.smoothquant import SmoothQuant
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import QuantSpec
from jaxquant.transforms.calibrate import calibrate
from jaxquant.transforms.memory import types_bytes
from jaxquant.transforms.quantize import quantize_params

WIDTHS = (8, 4, 3, 2)
GROUP_SIZE = 128
WEIGHTS: dict[str, Any] = {"RTN": RTN, "AWQ": AWQ, "GPTQ": GPTQ}  # at every width; AWQ where rounding loses something
INPUTS_TOO = {"SmoothQuant": SmoothQuant(), "LLM.int8()": LLMInt8()}  # at 8 bits, inputs as well as weights
LINES = {
    "RTN": ("o", "#d62728"),
    "AWQ": ("^", "#ff7f0e"),
    "GPTQ": ("s", "#1f77b4"),
    "SmoothQuant": ("D", "#2ca02c"),
    "LLM.int8()": ("*", "#9467bd"),
}
CALIBRATION = (128, 256)  # samples, tokens in each
EVALUATION = (16, 256)  # windows, tokens in each


@dataclasses.dataclass(frozen=True)
class Row:
    """One quantized model of the demo.

    Attributes:
      method, bits: how its linear layers were quantized.
      activation_bits: of the inputs of those layers; 16 stands for floating point.
      size: bytes of all its parameters, as memory holds them.
      relative_size: of the quantized weights alone, to the same weights in 16 bits.
      bits_per_weight: of the quantized weights, with scales.
      perplexity, loss_increase, loss_stderr: on held-out text; the increase in nats per token over the float model.
      kl: mean KL divergence from the float model, nats per token.
      top1_agreement: share of predictions whose most likely token is the float model's.
      seconds: to quantize, compilation included and calibration not.
    """

    method: str
    bits: int
    activation_bits: int
    size: int
    relative_size: float
    bits_per_weight: float
    perplexity: float
    loss_increase: float
    loss_stderr: float
    kl: float
    top1_agreement: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Demo:
    """All that the demo measured; `float_*` are of the model before quantization."""

    float_size: int
    float_perplexity: float
    calibration_tokens: int
    calibration_seconds: float
    evaluation_tokens: int
    group_size: int
    jax_version: str
    device: str
    rows: tuple[Row, ...]


def run(progress: workflows.Progress = workflows.silent) -> Demo:
    """Quantizes the packaged model by each method at each width and evaluates each on held-out text."""
    model, params = pretrained.load_pretrained("tinylm", dtype="float32")
    text = workflows.TextSource("tinylm")
    samples = workflows.calibration_samples(model, text, None, *CALIBRATION).tokens
    tokens = text.corpus("held_out", EVALUATION[0] * EVALUATION[1])
    recipe = model.recipe(RTN(QuantSpec()))  # only which weights matters here: one pass serves all that follow
    start = time.perf_counter()
    stats = calibrate(model.apply, params, workflows.batches(samples, progress), recipe=recipe)
    jax.block_until_ready([p.inputs for p in stats.products.values()])
    calibration_seconds = time.perf_counter() - start
    rows: list[Row] = []
    float_perplexity = 0.0
    configs = _configs()
    for name, config in configs:
        progress("quantizing and evaluating", len(rows), len(configs))
        start = time.perf_counter()
        quantized, _ = quantize_params(params, stats, model.recipe(config))
        jax.block_until_ready(quantized)
        seconds = time.perf_counter() - start
        result = compare(model.apply, quantized, params, tokens, context=EVALUATION[1])
        float_perplexity = result.baseline_perplexity
        rows.append(_row(name, config.spec, quantized, result, seconds))
    progress("quantizing and evaluating", len(configs), len(configs))
    size, device = types_bytes(params), jax.devices()[0].device_kind
    return Demo(size, float_perplexity, samples.size, calibration_seconds, tokens.size, GROUP_SIZE, jax.__version__,
                device, tuple(rows))  # fmt: skip


def _configs() -> list[tuple[str, Any]]:
    """Every method at every width it is meant for."""
    specs = [QuantSpec(bits=bits, group_size=GROUP_SIZE) for bits in WIDTHS]
    rows = [(name, m(spec)) for spec in specs for name, m in WEIGHTS.items() if name != "AWQ" or spec.bits < 8]
    return rows + list(INPUTS_TOO.items())


def _row(method: str, spec: QuantSpec, params: Any, result, seconds: float) -> Row:
    weights = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_qtensor) if is_qtensor(leaf)]
    stored = 8 * sum(q.nbytes for q in weights) / sum(q.size for q in weights)
    return Row(
        method=method,
        bits=spec.bits,
        activation_bits=16 if spec.activations is None else spec.activations.bits,
        size=types_bytes(params),
        relative_size=stored / 16,
        bits_per_weight=stored,
        perplexity=result.perplexity,
        loss_increase=result.loss_increase.mean,
        loss_stderr=result.loss_increase.stderr,
        kl=result.kl.mean,
        top1_agreement=result.top1_agreement.mean,
        seconds=seconds,
    )


def save(demo: Demo, out: Path) -> list[Path]:
    """Writes `demo.json` and the plots `size.png` and `perplexity.png`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "demo.json", out / "size.png", out / "perplexity.png"]
    files[0].write_text(json.dumps(dataclasses.asdict(demo), indent=1) + "\n")
    _save_figure(_size_plot(demo), files[1])
    _save_figure(_perplexity_plot(demo), files[2])
    return files


def _save_figure(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure).print_png(file)  # no pyplot: nothing global, and no display is looked for


def _size_plot(demo: Demo) -> Figure:
    """Relative size against precision."""
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    rows = [row for row in demo.rows if row.method == "GPTQ"]  # those of RTN are as large
    labels = ["16 (float)", *(str(row.bits) for row in rows)]
    sizes = [1.0, *(row.relative_size for row in rows)]
    bars = axes.bar(labels, sizes, color=["#9aa0a6"] + ["#1f77b4"] * len(rows), width=0.6)
    axes.bar_label(bars, [f"{size:.3f}" for size in sizes], padding=2)
    axes.set(xlabel="bits per code", ylabel="size of the quantized weights, relative to 16 bits", ylim=(0, 1.12))
    axes.set_title(f"Size, scales included (groups of {demo.group_size})")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _perplexity_plot(demo: Demo) -> Figure:
    """Perplexity against bits per weight, one line per method."""
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for method, (marker, color) in LINES.items():
        rows = sorted((row for row in demo.rows if row.method == method), key=lambda row: row.bits_per_weight)
        x, y = [row.bits_per_weight for row in rows], [row.perplexity for row in rows]
        label = method + (" (8-bit inputs)" if rows and rows[0].activation_bits == 8 else "")
        axes.plot(x, y, marker=marker, color=color, label=label)
    axes.axhline(demo.float_perplexity, color="#5f6368", linestyle="--", linewidth=1, label="float")
    axes.set(xlabel="bits per weight, scales included", ylabel="perplexity (log scale)", yscale="log")
    ticks = np.geomspace(*axes.get_ylim(), 6)
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title("Perplexity on held-out text")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
