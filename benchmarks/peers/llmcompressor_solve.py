"""Solves given problems with llm-compressor's `quantize_weight`, in llm-compressor's environment.

    python llmcompressor_solve.py PROBLEM.npz GROUP_SIZE ACT_ORDER

The file holds `w` `[out, in]` and `gram` `[in, in]`; ACT_ORDER is 0 or 1. Scales are those of the original weights, and
are chosen before the clock starts. Prints a line of JSON when it is ready, and for each
line that it reads one with the seconds of a solve and its output error, trace(Δ·gram·Δᵀ).
"""

import json
import sys
import time

import numpy as np
import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight


def main(file: str, group_size: int, act_order: bool) -> None:
    problem = np.load(file)
    w, gram = torch.from_numpy(problem["w"]), torch.from_numpy(problem["gram"])
    settings = QuantizationArgs(
        num_bits=4,
        group_size=group_size,
        symmetric=True,
        strategy=QuantizationStrategy.GROUP,
        actorder=ActivationOrdering.WEIGHT if act_order else None,
    )
    groups = w.reshape(w.shape[0], -1, group_size)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), settings)
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        inputs = [a[None].clone() for a in (w, gram, scale, zero_point)]  # it works in place
        start = time.perf_counter()
        quantized, *_ = quantize_weight(*inputs, None, settings)
        seconds = time.perf_counter() - start
        error = (quantized[0] - w).double()
        print(json.dumps({"seconds": seconds, "error": float((error @ gram.double() * error).sum())}), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
