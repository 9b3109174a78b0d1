"""Loss increase of the packaged model under every method and width, on held-out text.

    python benchmarks/quality.py [--settings NAME ...] [--out benchmarks/results/quality.json]

Each number is the increase of the mean negative log-likelihood over the float model in nats per token, with the
standard error of the paired difference. All methods read one calibration pass. A second table is of 8-bit weights and
inputs, for the packaged model and for its outlier twin: an equivalent model in which a few channels of the inputs are
30 to 60 times as large; it is left out where settings are named.

"Learned rounding" goes on from AWQ + GPTQ refined: `jq.reconstruct`, layer by layer, on the same calibration samples.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import environment
import rounding
from settings import REFINED

import jaxquant as jq
from jaxquant import workflows

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from twins import outlier_twin

SPECS = {
    "W8 per channel": jq.int8(),
    "W4 g128": jq.int4(group_size=128),
    "W4 g128 asymmetric": jq.int4(group_size=128, symmetric=False),
    "W4 per channel": jq.int4(),
    "W3 g128": jq.int3(group_size=128),
    "W3 per channel": jq.int3(),
    "W2 g64 asymmetric": jq.QuantSpec(bits=2, group_size=64, symmetric=False),
}
METHODS = {
    "RTN": jq.RTN,
    "AWQ": jq.AWQ,
    "GPTQ in order": functools.partial(jq.GPTQ, act_order=False),
    "GPTQ": jq.GPTQ,
    "GPTQ refined": functools.partial(jq.GPTQ, **REFINED),
    "AWQ + GPTQ refined": lambda spec: jq.Chain(jq.AWQ(spec), jq.GPTQ(spec, **REFINED)),
}
LEARNED = "learned rounding"
ROUNDING_STEPS, RATES = 200, {4: 2e-3, 3: 5e-3, 2: 5e-3}  # by bits
DYNAMIC, STATIC = (jq.int8(activations=jq.ActivationSpec(static=static)) for static in (False, True))
INPUTS_TOO = {
    "RTN, dynamic": jq.RTN(DYNAMIC),
    "RTN, static": jq.RTN(STATIC),
    "SmoothQuant 0.5, dynamic": jq.SmoothQuant(0.5, DYNAMIC),
    "SmoothQuant, dynamic": jq.SmoothQuant(None, DYNAMIC),
    "SmoothQuant, static": jq.SmoothQuant(None, STATIC),
    "SmoothQuant + GPTQ, dynamic": jq.Chain(jq.SmoothQuant(None, DYNAMIC), jq.GPTQ(DYNAMIC)),
    "LLM.int8()": jq.LLMInt8(),
}
SAMPLES, LENGTH = 128, 512
WINDOWS, CONTEXT = 64, 512


def compared(model, params, quantized, tokens, what: str) -> dict[str, Any]:
    found = jq.compare(model.apply, quantized, params, tokens, context=CONTEXT)
    print(f"{what}: {shown(found.loss_increase)}, KL {shown(found.kl, 5)}", flush=True)
    return found._asdict()


def methods_of(model, params, stats, spec, samples, tokens, name: str) -> dict[str, Any]:
    """What each method makes of one setting."""
    row = {}
    for method, make in METHODS.items():
        quantized, report = jq.quantize_params(params, stats, model.recipe(make(spec)))
        row[method] = compared(model, params, quantized, tokens, f"{name}, {method}")
        row[method]["fallbacks"] = len(report.fallbacks)
    if spec.bits in RATES:
        found = rounding.learned(model, params, quantized, samples, steps=ROUNDING_STEPS, rate=RATES[spec.bits])
        row[LEARNED] = compared(model, params, found, tokens, f"{name}, {LEARNED}")
    return row


def measure(settings: list[str]) -> dict:
    model, params = jq.load_pretrained("tinylm", dtype="float32")
    text = workflows.TextSource("tinylm")
    samples = workflows.calibration_samples(model, text, None, SAMPLES, LENGTH).tokens
    tokens = text.corpus("held_out", WINDOWS * CONTEXT)
    stats = jq.calibrate(model.apply, params, workflows.batches(samples))
    names = settings or list(SPECS)
    weights = {name: methods_of(model, params, stats, SPECS[name], samples, tokens, name) for name in names}
    measured = {"calibration_tokens": samples.size, "results": weights}
    return measured if settings else measured | {"inputs too": inputs_too(model, params, stats, samples, tokens)}


def inputs_too(model, params, stats, samples, tokens) -> dict[str, Any]:
    """The second table."""
    twin = outlier_twin(params)
    models = {
        "packaged model": (params, stats),
        "outlier twin": (twin, jq.calibrate(model.apply, twin, workflows.batches(samples))),
    }

    def row(method, config):
        return {
            name: compared(model, p, jq.quantize_params(p, s, model.recipe(config))[0], tokens, f"{method}, {name}")
            for name, (p, s) in models.items()
        }

    return {method: row(method, config) for method, config in INPUTS_TOO.items()}


def shown(estimate, digits: int = 4) -> str:
    return f"{estimate.mean:.{digits}f} ± {estimate.stderr:.{digits}f}"


def tables(measured: dict) -> str:
    columns = [*METHODS, LEARNED]
    lines = ["| | " + " | ".join(columns) + " | RTN ÷ best |", "|---" * (len(columns) + 2) + "|"]
    for name, row in measured["results"].items():
        increase = {method: found["loss_increase"] for method, found in row.items()}
        best = min(e.mean for method, e in increase.items() if method != "RTN")
        clear = increase["RTN"].mean > 3 * increase["RTN"].stderr  # a ratio of noise would say nothing
        ratio = f"{increase['RTN'].mean / best:.2f}" if clear else "–"
        cells = [shown(increase[column]) if column in increase else "–" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {ratio} |")
    if "inputs too" in measured:
        lines += ["", "| W8A8 | packaged model | outlier twin |", "|---|---|---|"]
    for method, row in measured.get("inputs too", {}).items():
        cells = [shown(found["loss_increase"], 5) for found in row.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    first = next(iter(next(iter(measured["results"].values())).values()))
    note = f"{measured['calibration_tokens']:,} calibration tokens, {first['tokens']:,} scored held-out tokens"
    return f"{environment.line()}\n\n{note}; float perplexity {first['baseline_perplexity']:.3f}\n\n" + "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    parser.add_argument("--settings", nargs="+", choices=list(SPECS), default=[], help="only these, and weights alone")
    options = parser.parse_args()
    measured = measure(options.settings)
    print("\n" + tables(measured))
    if options.out:
        options.out.write_text(json.dumps({**environment.describe(), **measured}, indent=1) + "\n")
