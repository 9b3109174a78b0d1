"""compressed-tensors' `pack-quantized`: integer weights as vLLM and transformers read them.

A Linear of `[out, in]` = (N, K) with b-bit codes becomes, in place of its `weight`,

    weight_packed  int32 [N, ceil(K·b / 32)]  per row, the codes + 2^(b-1) as a dense little-endian bitstream along K
    weight_scale   the weight's dtype [N, K / group_size], or [N, 1] per channel
    weight_shape   int64 [2], (N, K)

and `quantization_config` in config.json says which modules have which bits and groups (github.com/vllm-project/
compressed-tensors: compressors/pack_quantized, quantization/quant_args.py, which forbids keys it does not know).
Release 0.18 made 3, 5, 6 and 7 bits dense; before, a word held only whole codes. This module writes the dense layout
and recognizes the older one by its width.

Only what the format can say is written: symmetric codes in the full range, one matrix `[in, out]` per Linear, scales in
the weight's own dtype.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.checkpoints.huggingface import CONFIG
from jaxquant.checkpoints.json_file import write_json
from jaxquant.checkpoints.tensors import Tensors, same_bits, write_tensors
from jaxquant.numerics.packing import pack_bits, packed_size, unpack_bits
from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.numerics.spec import QuantSpec

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_MODEL_DTYPES = ("float32", "bfloat16", "float16")
