"""Quantizes a checkpoint with llm-compressor's `oneshot`; run by the benchmarks in llm-compressor's environment.

    python llmcompressor_oneshot.py MODEL TOKENS.npy OUT [SETTINGS as JSON]

Calibrates on the token ids `[samples, time]`. Prints a line of JSON: the seconds without imports, of them those of
`oneshot` itself, and the peak memory of the process in MiB.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

SETTINGS = {"bits": 4, "group_size": 128, "symmetric": True, "method": "gptq"}
SETTINGS |= {"act_order": True, "observer": "memoryless_minmax"}


def modifiers(bits, group_size, symmetric, method: str, act_order: bool, observer: str):
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group" if group_size else "channel"}
    weights |= {"group_size": group_size, "observer": observer}
    groups = {"linears": {"targets": ["Linear"], "weights": weights}}
    if method == "awq":
        torch.Tensor.pin_memory = lambda tensor, *args: tensor  # without a GPU there is nothing to pin for
        return AWQModifier(config_groups=groups, ignore=["lm_head"])
    # Not within the weights' own settings: there, None would mean the modifier's default, which is act-order.
    return [GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder="static" if act_order else None)]


def main(model: str, tokens: str, out: str, settings: str = "{}") -> None:
    start = time.perf_counter()
    samples = np.load(tokens)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in torch.from_numpy(samples).long()]
    before = time.perf_counter()
    oneshot(
        model=network,
        dataset=DataLoader(rows),
        recipe=modifiers(**SETTINGS | json.loads(settings)),
        num_calibration_samples=len(samples),
        max_seq_length=samples.shape[1],
    )
    solved = time.perf_counter() - before
    network.save_pretrained(out, save_compressed=True)
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    about = {"threads": torch.get_num_threads(), "version": metadata.version("llmcompressor")}
    print(json.dumps({"seconds": seconds, "oneshot": solved, "peak": peak, **about}))


if __name__ == "__main__":
    main(*sys.argv[1:])
