"""Rounds a checkpoint's linear layers with optimum-quanto or torchao, and evaluates it; run in their environment.

    python torch_ptq.py TOOL MODEL WINDOWS.npy LOSSES.npy

TOOL is optimum-quanto or torchao. Weights get 4 bits in groups of 128, all but the output head. Writes the negative
log-likelihood per token, as the mean of each window `[windows, time]`, and prints a line of JSON: the seconds without
imports and evaluation, and the peak memory of the process until then in MiB.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def quanto(network) -> None:
    from optimum.quanto import freeze, qint4, quantize

    quantize(network, weights=qint4, exclude="lm_head")  # in groups of 128, as it always does where they divide
    freeze(network)


def torchao(network) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128))
    quantize_(network, config, lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head")


def losses(network, windows: torch.Tensor) -> np.ndarray:
    """Negative log-likelihood per token, as the mean of each window."""
    means = []
    with torch.no_grad():
        for batch in windows.split(8):
            logs = network(batch).logits[:, :-1].log_softmax(-1)
            means.append(-logs.gather(-1, batch[:, 1:, None])[..., 0].double().mean(-1))
    return torch.cat(means).numpy()


def main(tool: str, model: str, windows: str, out: str) -> None:
    start = time.perf_counter()
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    {"optimum-quanto": quanto, "torchao": torchao}[tool](network)
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    np.save(out, losses(network, torch.from_numpy(np.load(windows)).long()))
    peak = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "version": metadata.version(tool)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
