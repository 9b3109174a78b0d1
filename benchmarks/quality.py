"""Loss increase of the packaged model under every method and width, on held-out text.

    python benchmarks/quality.py [--out benchmarks/results/quality.json]

Each number is the increase of the mean negative log-likelihood over the float model in nats per token, with the
standard error of the paired difference. All methods read one calibration pass.
"""

import argparse
import json
from pathlib import Path

import environment

import jaxquant as jq
from jaxquant import workflows

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
    "GPTQ": lambda spec: jq.GPTQ(spec, act_order=False),
    "GPTQ act-order": jq.GPTQ,
}
SAMPLES, LENGTH = 128, 512
WINDOWS, CONTEXT = 64, 512


def measure() -> dict:
    model, params = jq.load_pretrained("tinylm", dtype="float32")
    text = workflows.TextSource("tinylm")
    samples = workflows.calibration_samples(model, text, None, SAMPLES, LENGTH)
    tokens = text.corpus("held_out", WINDOWS * CONTEXT)
    stats = jq.calibrate(model.apply, params, workflows.batches(samples, workflows.silent))
    results = {}
    for name, spec in SPECS.items():
        results[name] = {}
        for method, make in METHODS.items():
            quantized, report = jq.quantize_params(params, stats, model.recipe(make(spec)))
            found = jq.compare(model.apply, quantized, params, tokens, context=CONTEXT)
            results[name][method] = {**found._asdict(), "fallbacks": len(report.fallbacks)}
            print(
                f"{name:<20}{method:<16}{found.loss_increase.mean:+.4f} ± {found.loss_increase.stderr:.4f}", flush=True
            )
    return {"calibration_tokens": samples.size, "results": results}


def table(measured: dict) -> str:
    lines = ["| | " + " | ".join(METHODS) + " | RTN ÷ best GPTQ |", "|---" * (len(METHODS) + 2) + "|"]
    for name, row in measured["results"].items():
        increase = {method: found["loss_increase"] for method, found in row.items()}
        cells = [f"{e.mean:.4f} ± {e.stderr:.4f}" for e in increase.values()]
        best = min(e.mean for method, e in increase.items() if method != "RTN")
        clear = increase["RTN"].mean > 3 * increase["RTN"].stderr  # a ratio of noise would say nothing
        ratio = f"{increase['RTN'].mean / best:.2f}" if clear else "–"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {ratio} |")
    first = next(iter(next(iter(measured["results"].values())).values()))
    note = f"{measured['calibration_tokens']:,} calibration tokens, {first['tokens']:,} scored held-out tokens"
    return f"{environment.line()}\n\n{note}; float perplexity {first['baseline_perplexity']:.3f}\n\n" + "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    measured = measure()
    print("\n" + table(measured))
    if options.out:
        options.out.write_text(json.dumps({**environment.describe(), **measured}, indent=1) + "\n")
