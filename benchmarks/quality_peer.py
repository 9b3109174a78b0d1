"""Loss increase of the packaged model under GPTQ and AWQ, ours and llm-compressor's, as transformers computes it.

    python benchmarks/quality_peer.py --peer PYTHON [--settings NAME ...] [--work FOLDER]
        [--out benchmarks/results/quality_peer.json]

PYTHON is the interpreter of an environment with llm-compressor; this one needs torch and compressed-tensors. Both tools
quantize the packaged model on the same calibration tokens and write compressed-tensors; transformers evaluates every
checkpoint in float32 on the same held-out windows. GPTQ runs with and without act-order and with scales that clip by
the squared error of the weights (`mse`); only jaxquant has more: scales that clip by the error that the diagonal of the
Gram matrix gives, refinement, GPTQ of AWQ's scales, and learned rounding, which goes on from there with float inputs
(`jq.reconstruct`). llm-compressor quantizes a layer on what the quantized layers
before it give (`oneshot` is sequential), jaxquant a weight on what the quantized weights before it give. Numbers are
nats per token with the standard error of the paired difference over windows; the last rows compare the best of jaxquant
with the best of llm-compressor. With a folder, checkpoints are kept there and are not made again; what
`benchmarks/own_text.py` has left in it, trained on text that the model wrote itself, is compared by itself.
"""

import argparse
import functools
import json
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import environment
import jax.numpy as jnp
import numpy as np
import rounding
import torch
from peers import torch_ptq
from settings import LEARNED, REFINED, SPECS, TOKENS, TRAINED, checkpoint
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.utils import logging

import jaxquant as jq
from jaxquant import workflows
from jaxquant.models import TINYLM

OURS = {
    "RTN": jq.RTN,
    "AWQ": jq.AWQ,
    "GPTQ act-order": jq.GPTQ,
    "GPTQ in order": functools.partial(jq.GPTQ, act_order=False),
    "GPTQ act-order, mse": functools.partial(jq.GPTQ, clip="mse"),
    "GPTQ refined": functools.partial(jq.GPTQ, **REFINED),
    "AWQ + GPTQ refined": lambda spec: jq.Chain(jq.AWQ(spec), jq.GPTQ(spec, **REFINED)),
}
THEIRS = {
    "AWQ": {"method": "awq"},
    "GPTQ act-order": {},
    "GPTQ in order": {"act_order": False},
    "GPTQ act-order, mse": {"observer": "memoryless_mse"},
}
SAMPLES, WINDOWS, LENGTH = 128, 256, 512


STEPS, RATES = 200, {4: 2e-3, 3: 5e-3, 2: 5e-3}  # by bits


def ours(tokens: Path, out: Path, config: Any) -> None:
    sizes = {"num_samples": SAMPLES, "seq_len": LENGTH}
    workflows.quantize_checkpoint("tinylm", out, config, calibration=tokens, format="compressed-tensors", **sizes)


def learned(tokens: Path, out: Path, spec: jq.QuantSpec) -> None:
    model, params = jq.load_pretrained("tinylm", dtype="float32")
    samples = np.load(tokens)
    stats = jq.calibrate(model.apply, params, jnp.asarray(samples).reshape(-1, rounding.ROWS, LENGTH))
    refined, _ = jq.quantize_params(params, stats, model.recipe(jq.GPTQ(spec, **REFINED)))
    qparams = rounding.learned(model, params, refined, samples, steps=STEPS, rate=RATES[spec.bits])
    jq.save(out, model, qparams, format="compressed-tensors")


def theirs(peer: str, tokens: Path, out: Path, spec: jq.QuantSpec, **options) -> None:
    script = Path(__file__).parent / "peers" / "llmcompressor_oneshot.py"
    fields = {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric}
    subprocess.run([peer, script, TINYLM, tokens, out, json.dumps(fields | options)], check=True, capture_output=True)


def losses(directory: Path, windows: torch.Tensor, symmetric: bool = True) -> np.ndarray:
    """Negative log-likelihood per token, as the mean of each window."""
    options = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    return torch_ptq.losses(network.eval(), windows)


def estimate(difference: np.ndarray) -> tuple[float, float]:
    """Mean over windows of equal length, and its standard error."""
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def shown(difference: np.ndarray, sign: str = "") -> str:
    mean, stderr = estimate(difference)
    return f"{mean:{sign}.4f} ± {stderr:.4f}"


def made(out: Path, make) -> Path:
    """A directory that `make` writes, unless it is there."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as unfinished:
            make(Path(unfinished) / "model")
            (Path(unfinished) / "model").rename(out)
    return out


def checkpoints(peer: str, tokens: Path, name: str, folder: Path) -> dict[str, Path]:
    """Every checkpoint of a setting, made where it is not there."""
    spec = SPECS[name]
    makers: dict[str, Any] = {
        f"jaxquant, {what}": functools.partial(ours, tokens, config=method(spec)) for what, method in OURS.items()
    }
    makers[LEARNED] = functools.partial(learned, tokens, spec=spec)
    for what, options in THEIRS.items():
        makers[f"llm-compressor, {what}"] = functools.partial(theirs, peer, tokens, spec=spec, **options)
    found = {what: made(checkpoint(folder, name, what), make) for what, make in makers.items()}
    own = checkpoint(folder, name, TRAINED)
    return {**found, TRAINED: own} if own.exists() else found


def kept_tokens(folder: Path, samples: np.ndarray) -> Path:
    """The file with the tokens that everything in the folder is calibrated on; another Python comes with other text."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = folder / TOKENS
    if not tokens.exists():
        np.save(tokens, samples)
    if not np.array_equal(np.load(tokens), samples):
        raise SystemExit(f"{folder} holds checkpoints that are calibrated on other tokens; use a new folder")
    return tokens


def measure(peer: str, settings: list[str], work: Path | None) -> dict:
    text = workflows.TextSource("tinylm")
    model, _ = jq.load_pretrained("tinylm")
    samples = workflows.calibration_samples(model, text, None, SAMPLES, LENGTH).tokens
    windows = torch.from_numpy(text.corpus("held_out", WINDOWS * LENGTH).astype(np.int64)).reshape(-1, LENGTH)
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        tokens = kept_tokens(folder, samples)
        floats = losses(TINYLM, windows)
        for name in settings:
            found[name] = {}
            for what, out in checkpoints(peer, tokens, name, folder).items():
                found[name][what] = increase = losses(out, windows, SPECS[name].symmetric) - floats
                print(f"{name:<20}{what:<36}{shown(increase)}", flush=True)
    return {"float": float(floats.mean()), "calibration_tokens": samples.size, "increases": found}


def best(row: dict[str, np.ndarray], tool: str) -> np.ndarray:
    """The smallest increase that a tool comes to without training."""
    return min((increase for what, increase in row.items() if tool in what and what != TRAINED), key=np.mean)


def ratio(a: np.ndarray | None, b: np.ndarray) -> str:
    return "–" if a is None else f"{a.mean() / b.mean():.2f}"


def table(measured: dict) -> str:
    found = measured["increases"]
    columns = list(dict.fromkeys(what for row in found.values() for what in row))
    lines = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    lines += [
        f"| {c} | " + " | ".join(shown(row[c]) if c in row else "–" for row in found.values()) + " |" for c in columns
    ]
    ours, theirs = ([best(row, tool) for row in found.values()] for tool in ("jaxquant", "llm-compressor"))
    differences = [shown(a - b, "+") for a, b in zip(ours, theirs, strict=True)]
    lines.append(f"| best without training − best | {' | '.join(differences)} |")
    lines.append(f"| best without training ÷ best | {' | '.join(map(ratio, ours, theirs))} |")
    if TRAINED in columns:
        trained = [row.get(TRAINED) for row in found.values()]
        lines.append(f"| trained ÷ best | {' | '.join(map(ratio, trained, theirs))} |")
    note = f"{measured['calibration_tokens']:,} calibration tokens, {WINDOWS * (LENGTH - 1):,} scored held-out tokens"
    return f"{note}; float loss {measured['float']:.4f}\n\n" + "\n".join(lines)


def as_json(measured: dict) -> dict:
    increases = {n: {c: estimate(d) for c, d in row.items()} for n, row in measured["increases"].items()}
    return {**measured, "increases": increases}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="interpreter that has llm-compressor")
    parser.add_argument("--settings", nargs="+", choices=list(SPECS), default=list(SPECS))
    parser.add_argument("--work", type=Path, help="keep checkpoints in this folder, and make only what is not there")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # torch's and compressed-tensors' own deprecations
    logging.disable_progress_bar()
    measured = measure(options.peer, options.settings, options.work)
    print(f"\n{environment.line(options.peer)}\n\n{table(measured)}")
    if options.out:
        about = environment.describe(options.peer)
        options.out.write_text(json.dumps({**about, **as_json(measured)}, indent=1) + "\n")
