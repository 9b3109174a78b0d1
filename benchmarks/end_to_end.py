"""Load, calibrate, quantize by GPTQ, save: the whole job against llm-compressor's `oneshot`, each in a process.

    python benchmarks/end_to_end.py --peer PYTHON [--rounds 3] [--out benchmarks/results/end_to_end.json]

PYTHON is the interpreter of an environment with llm-compressor. The model is a random Llama in float32. Both tools read
the same directory and tokens, use all cores, and write compressed-tensors, 4 bits in groups of 128 with act-order.
Seconds are of the whole process, and without its imports (compilation is in both). The processor's own seconds mean
something where other programs ran at the same time, if this is pinned to one core (`taskset -c 0`): threads that wait
for each other are busy too. Memory is the peak resident set that the process itself reads off (Linux); what a parent is
told of a child is no less than the parent's own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import environment
import jax
import numpy as np
from safetensors.numpy import save_file

import jaxquant as jq
from jaxquant.checkpoints.huggingface import copy_companions
from jaxquant.models import TINYLM
from jaxquant.models.names import tensors_from_params

SAMPLES, LENGTH = 32, 256
JAXQUANT = """
import json, sys, time
from jaxquant import cli
start = time.perf_counter()
failed = cli.main(sys.argv[1:])
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"seconds": seconds, "peak": int(status["VmHWM"].split()[0]) / 1024}))
sys.exit(failed)
"""


def make_model(directory: Path, layers: int, hidden: int) -> None:
    """A random Llama, with the packaged model's tokenizer."""
    config = json.loads((TINYLM / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 11 * hidden // 4}
    config |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "head_dim": 64}
    config |= {"tie_word_embeddings": False, "dtype": "float32"}
    model = jq.Model.from_hf(config)
    directory.mkdir()
    save_file(tensors_from_params(model.config, model.init(jax.random.key(0))), directory / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    copy_companions(TINYLM, directory)


def run(command: list) -> dict:
    """Seconds and memory of one process, and what it printed as its last line."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        log.seek(0)
        text = log.read()
    if status:
        raise RuntimeError(f"{command} failed:\n{text[-3000:]}")
    inner = json.loads(text.strip().splitlines()[-1])
    busy = usage.ru_utime + usage.ru_stime
    return {"process": wall, "without imports": inner["seconds"], "CPU seconds": busy, "peak MiB": inner["peak"]}


def race(peer: str, rounds: int, layers: int, hidden: int) -> list[dict[str, dict]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_model(root / "model", layers, hidden)
        np.save(root / "tokens.npy", np.random.default_rng(0).integers(0, 4096, (SAMPLES, LENGTH)))
        settings = ["--calibration", root / "tokens.npy", "--num-samples", SAMPLES, "--seq-len", LENGTH]
        ours = ["quantize", root / "model", *settings, "--format", "compressed-tensors", "--overwrite"]
        oneshot = Path(__file__).parent / "peers" / "llmcompressor_oneshot.py"
        commands = {
            "jaxquant": [sys.executable, "-c", JAXQUANT, *ours, "--out", root / "ours"],
            "llm-compressor": [peer, oneshot, root / "model", root / "tokens.npy", root / "theirs"],
        }
        results = []
        for _ in range(rounds):
            results.append({name: run(command) for name, command in commands.items()})
            print(results[-1], flush=True)
        for out in ("ours", "theirs"):
            _, params = jq.load_pretrained(root / out)
            assert params["layers"]["mlp"]["down_proj"]["kernel"].spec == jq.int4(group_size=128), out
        return results


def table(results: list[dict[str, dict]]) -> str:
    columns = list(results[0]["jaxquant"])
    rows = {name: [f"{median(r[name][c] for r in results):.4g}" for c in columns] for name in results[0]}
    ratios = [median(r["llm-compressor"][c] / r["jaxquant"][c] for r in results) for c in columns]
    rows["llm-compressor ÷ jaxquant"] = [f"{ratio:.2f}" for ratio in ratios]
    head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="interpreter that has llm-compressor")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    results = race(options.peer, options.rounds, options.layers, options.hidden)
    print(f"\n{environment.line(options.peer)}\n\n{table(results)}")
    if options.out:
        about = environment.describe(options.peer)
        options.out.write_text(json.dumps({**about, "rounds": results}, indent=1) + "\n")
