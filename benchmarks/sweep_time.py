"""Every method at every width after one calibration, beside a single AWQ run of llm-compressor, in one run.

    python benchmarks/sweep_time.py --peer PYTHON [--out benchmarks/results/sweep_time.json]

PYTHON is the interpreter of an environment with llm-compressor. Both start from the packaged model and the same tokens.
Ours: RTN, GPTQ, AWQ and GPTQ of AWQ's scales at 4, 3 and 2 bits (groups of 128), SmoothQuant with 8-bit inputs, and
LLM.int8(). Seconds are of whole jobs without imports, compilation included.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import environment
import jax
import numpy as np

import jaxquant as jq
from jaxquant import workflows
from jaxquant.models import TINYLM

SAMPLES, LENGTH = 128, 512
WIDTHS = (4, 3, 2)
METHODS = {
    "RTN": jq.RTN,
    "GPTQ": jq.GPTQ,
    "AWQ": jq.AWQ,
    "AWQ + GPTQ": lambda spec: jq.Chain(jq.AWQ(spec), jq.GPTQ(spec)),
}


def ours(samples: np.ndarray) -> dict[str, float]:
    """Seconds of loading and calibrating, and of each method with all its widths."""
    start = time.perf_counter()
    model, params = jq.load_pretrained("tinylm", dtype="float32")
    stats = jq.calibrate(model.apply, params, workflows.batches(samples))
    jax.block_until_ready([product.inputs for product in stats.products.values()])
    found = {"load and calibrate": time.perf_counter() - start}
    specs = [jq.QuantSpec(bits=bits, group_size=128) for bits in WIDTHS]
    jobs = {name: [make(spec) for spec in specs] for name, make in METHODS.items()}
    jobs |= {"SmoothQuant W8A8": [jq.SmoothQuant()], "LLM.int8()": [jq.LLMInt8()]}
    for name, configs in jobs.items():
        start = time.perf_counter()
        for config in configs:
            jax.block_until_ready(jq.quantize_params(params, stats, model.recipe(config))[0])
        found[name] = time.perf_counter() - start
        print(f"{name}: {found[name]:.1f} s", flush=True)
    return found


def theirs(peer: str, samples: np.ndarray) -> float:
    """Seconds of one AWQ run."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", samples)
        script = Path(__file__).parent / "peers" / "llmcompressor_oneshot.py"
        command = [peer, script, TINYLM, Path(folder) / "tokens.npy", Path(folder) / "out", '{"method": "awq"}']
        return environment.run(command)["seconds"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="interpreter that has llm-compressor")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    text, model = workflows.TextSource("tinylm"), jq.load_pretrained("tinylm")[0]
    samples = workflows.calibration_samples(model, text, None, SAMPLES, LENGTH).tokens
    found = ours(samples)
    found["all of jaxquant's"] = sum(found.values())
    found["one AWQ run of llm-compressor"] = theirs(options.peer, samples)
    rows = [f"| {what} | {seconds:.1f} |" for what, seconds in found.items()]
    print("\n".join([f"\n{environment.line(options.peer)}\n", "| | seconds |", "|---|---|", *rows]))
    if options.out:
        about = environment.describe(options.peer)
        options.out.write_text(json.dumps({**about, "seconds": found}, indent=1) + "\n")
