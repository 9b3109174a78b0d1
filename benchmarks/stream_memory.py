"""Peak memory of quantizing a model that is larger than what is allowed: a random Llama in float32, layer by layer.

    python benchmarks/stream_memory.py [--layers 32] [--out benchmarks/results/stream_memory.json]

With 32 layers the model takes 4.1 GiB. Memory is the anonymous resident set (RssAnon: without the pages of mapped
files, which the system takes back when it likes) of the process that quantizes, read every 20 ms by its parent (Linux),
less what it was before the work: Python, the imports and JAX itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import environment
import numpy as np
from safetensors.numpy import save_file

from jaxquant.checkpoints.huggingface import copy_companions
from jaxquant.checkpoints.tensors import write_index
from jaxquant.models import TINYLM
from jaxquant.models.config import from_hf
from jaxquant.models.names import parameter_shapes, tensor_paths

HIDDEN, INNER = 1792, 4608
SAMPLES, LENGTH = 32, 256
CHILD = """
import sys
import jax.numpy as jnp
from jaxquant import cli
jnp.ones(3).sum().block_until_ready()
print("ready", flush=True)
sys.stdin.readline()
sys.stdout = sys.stderr
sys.exit(cli.main(sys.argv[1:]))
"""


def make_model(directory: Path, layers: int) -> int:
    """Writes a random Llama, a file for each layer; returns its bytes."""
    config = json.loads((TINYLM / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": 64}
    config |= {"num_attention_heads": HIDDEN // 64, "num_key_value_heads": HIDDEN // 128, "dtype": "float32"}
    decoder, rng = from_hf(config), np.random.default_rng(0)
    shapes, files = parameter_shapes(decoder), {}
    for name, path in tensor_paths(decoder).items():
        shape = shapes[path][path.startswith("layers/") :]
        shape = shape[::-1] if path.endswith("kernel") else shape
        files.setdefault(name.split(".")[2] if "layers" in name else "outer", {})[name] = shape
    directory.mkdir()
    for file, tensors in files.items():
        arrays = {
            name: np.ones(shape, np.float32) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, np.float32)
            for name, shape in tensors.items()
        }
        save_file(arrays, directory / f"model-{file}.safetensors", metadata={"format": "pt"})
    write_index(directory, [f"model-{file}.safetensors" for file in files])
    (directory / "config.json").write_text(json.dumps(config))
    copy_companions(TINYLM, directory)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def anonymous(pid: int) -> float:
    """MiB of anonymous resident memory of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status.get("RssAnon", "0 kB").split()[0]) / 1024


def measure(root: Path) -> dict[str, float]:
    """Quantizes the model by GPTQ and watches."""
    np.save(root / "tokens.npy", np.random.default_rng(0).integers(0, 4096, (SAMPLES, LENGTH)))
    settings = ["--calibration", root / "tokens.npy", "--num-samples", SAMPLES, "--seq-len", LENGTH]
    command = [sys.executable, "-c", CHILD, "quantize", root / "model", "--out", root / "out", *settings]
    with (root / "log").open("w") as log:
        child = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert child.stdout.readline() == "ready\n", (root / "log").read_text()
        base = peak = anonymous(child.pid)
        start = time.perf_counter()
        child.stdin.write("\n")
        child.stdin.close()
        while child.poll() is None:
            peak = max(peak, anonymous(child.pid))
            time.sleep(0.02)
    print((root / "log").read_text())
    assert child.returncode == 0
    return {"base MiB": base, "peak above MiB": peak - base, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make_model(Path(folder) / "model", options.layers)
        result = {"layers": options.layers, "model MiB": size / 2**20, **measure(Path(folder))}
    print(environment.line())
    print("\n| " + " | ".join(result) + " |\n" + "|---" * len(result) + "|")
    print("| " + " | ".join(f"{value:.4g}" for value in result.values()) + " |")
    if options.out:
        options.out.write_text(json.dumps({**environment.describe(), **result}, indent=1) + "\n")
