"""Loss increase of the packaged model under GPTQ, ours and llm-compressor's, as transformers computes it.

    python benchmarks/quality_peer.py --peer PYTHON [--out benchmarks/results/quality_peer.json]

PYTHON is the interpreter of an environment with llm-compressor; this one needs torch and compressed-tensors. Both tools
quantize the packaged model on the same calibration tokens, each with and without act-order and once more with scales
that clip (both call it `mse`), and write compressed-tensors; transformers evaluates every checkpoint in float32 on the
same held-out windows. llm-compressor quantizes a layer on what the quantized layers before it give (`oneshot` is
sequential), jaxquant on one pass of the float model. Numbers are nats per token with the standard error of the paired
difference over windows; the last column is the best of jaxquant minus the best of llm-compressor.
"""

import argparse
import json
import subprocess
import tempfile
import warnings
from pathlib import Path

import environment
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import jaxquant as jq
from jaxquant import workflows
from jaxquant.models import TINYLM

SPECS = {"W4 g128": (4, 128), "W3 g128": (3, 128), "W3 per channel": (3, None)}
OURS = {"act-order": {}, "in order": {"act_order": False}, "act-order, mse": {"mse": True}}
THEIRS = {
    "act-order": {},
    "in order": {"act_order": False},
    "act-order, mse": {"observer": "memoryless_mse"},
}
SAMPLES, WINDOWS, LENGTH = 128, 64, 512


def ours(tokens: Path, out: Path, bits: int, group_size: int | None, **options) -> None:
    config = jq.GPTQ(jq.QuantSpec(bits=bits, group_size=group_size), **options)
    sizes = {"num_samples": SAMPLES, "seq_len": LENGTH}
    workflows.quantize_checkpoint("tinylm", out, config, calibration=tokens, format="compressed-tensors", **sizes)


def theirs(peer: str, tokens: Path, out: Path, bits: int, group_size: int | None, **options) -> None:
    script = Path(__file__).parent / "peers" / "llmcompressor_oneshot.py"
    settings = json.dumps({"bits": bits, "group_size": group_size, **options})
    subprocess.run([peer, script, TINYLM, tokens, out, settings], check=True, capture_output=True)


def losses(directory: Path, windows: torch.Tensor) -> np.ndarray:
    """Negative log-likelihood per token, as the mean of each window."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    means = []
    with torch.no_grad():
        for batch in windows.split(8):
            logs = model(batch).logits[:, :-1].log_softmax(-1)
            means.append(-logs.gather(-1, batch[:, 1:, None])[..., 0].double().mean(-1))
    return torch.cat(means).numpy()


def estimate(difference: np.ndarray) -> tuple[float, float]:
    """Mean over windows of equal length, and its standard error."""
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def shown(difference: np.ndarray, sign: str = "") -> str:
    mean, stderr = estimate(difference)
    return f"{mean:{sign}.4f} ± {stderr:.4f}"


def measure(peer: str) -> dict:
    text = workflows.TextSource("tinylm")
    model, _ = jq.load_pretrained("tinylm")
    samples = workflows.calibration_samples(model, text, None, SAMPLES, LENGTH)
    windows = torch.from_numpy(text.corpus("held_out", WINDOWS * LENGTH).astype(np.int64)).reshape(-1, LENGTH)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        np.save(tokens, samples)
        floats = losses(TINYLM, windows)
        for name, spec in SPECS.items():
            made = {}
            for options, chosen in OURS.items():
                made[f"jaxquant, {options}"] = out = Path(folder) / f"{name} ours {options}"
                ours(tokens, out, *spec, **chosen)
            for options, chosen in THEIRS.items():
                made[f"llm-compressor, {options}"] = out = Path(folder) / f"{name} theirs {options}"
                theirs(peer, tokens, out, *spec, **chosen)
            found[name] = {what: losses(out, windows) - floats for what, out in made.items()}
            for what, increase in found[name].items():
                print(f"{name:<16}{what:<32}{shown(increase)}", flush=True)
    return {"float": float(floats.mean()), "calibration_tokens": samples.size, "increases": found}


def table(measured: dict) -> str:
    found = measured["increases"]
    columns = list(next(iter(found.values())))
    lines = ["| | " + " | ".join(columns) + " | best − best |", "|---" * (len(columns) + 2) + "|"]
    for name, row in found.items():
        cells = [shown(row[c]) for c in columns]
        best = [min((row[c] for c in columns if tool in c), key=np.mean) for tool in ("jaxquant", "llm-compressor")]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {shown(best[0] - best[1], '+')} |")
    note = f"{measured['calibration_tokens']:,} calibration tokens, {WINDOWS * (LENGTH - 1):,} scored held-out tokens"
    return f"{note}; float loss {measured['float']:.4f}\n\n" + "\n".join(lines)


def as_json(measured: dict) -> dict:
    increases = {n: {c: estimate(d) for c, d in row.items()} for n, row in measured["increases"].items()}
    return {**measured, "increases": increases}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="interpreter that has llm-compressor")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's and compressed-tensors' own deprecations
    logging.disable_progress_bar()
    measured = measure(options.peer)
    print(f"\n{environment.line(options.peer)}\n\n{table(measured)}")
    if options.out:
        about = environment.describe(options.peer)
        options.out.write_text(json.dumps({**about, **as_json(measured)}, indent=1) + "\n")
