"""Quantizes a checkpoint with llm-compressor's `oneshot`; run by the benchmarks in llm-compressor's environment.

    python llmcompressor_oneshot.py MODEL TOKENS.npy OUT [SETTINGS as JSON]

Calibrates on the token ids `[samples, time]`. Prints a line of JSON: the seconds without imports, and of them those of
`oneshot` itself.
"""

import json
import sys
import time

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

SETTINGS = {"bits": 4, "group_size": 128, "act_order": True, "batch_size": 1, "method": "gptq", "symmetric": True}


def modifiers(bits, group_size, act_order, method, symmetric, **_):
    weights = {
        "num_bits": bits,
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
    }
    if method == "awq":
        from llmcompressor.modifiers.awq import AWQModifier

        torch.Tensor.pin_memory = lambda self, *_: self  # it pins memory for a GPU, and fails where there is none
        groups = {"linears": {"targets": ["Linear"], "weights": weights}}
        return [AWQModifier(config_groups=groups, ignore=["lm_head"])]
    groups = {"linears": {"targets": ["Linear"], "weights": {**weights, "actorder": "static" if act_order else None}}}
    return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]


def main(model: str, tokens: str, out: str, settings: str = "{}") -> None:
    chosen = SETTINGS | json.loads(settings)
    start = time.perf_counter()
    samples = np.load(tokens)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in torch.from_numpy(samples).long()]
    before = time.perf_counter()
    oneshot(
        model=network,
        dataset=DataLoader(rows, batch_size=chosen["batch_size"]),
        recipe=modifiers(**chosen),
        num_calibration_samples=len(samples),
        max_seq_length=samples.shape[1],
    )
    solved = time.perf_counter() - before
    network.save_pretrained(out, save_compressed=True)
    print(json.dumps({"seconds": time.perf_counter() - start, "oneshot": solved, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
