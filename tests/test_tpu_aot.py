"""The Mosaic TPU kernels, compiled by the TPU's compiler in the package libtpu, on a machine without a TPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install 'jaxquant[tpu-aot]')"
)

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "tpu_compiler.py"
K, N = 1024, 512
PRODUCTS = {  # arguments of `compiled` there
    "W4A16": {"m": 16, "bits": 4, "group": 128},
    "W4A16, one token, zero points": {"m": 1, "bits": 4, "group": 128, "symmetric": False},
    "W4A16, many tokens": {"m": 300, "bits": 4, "group": 128},
    "W4A16, many tokens, zero points": {"m": 300, "bits": 4, "group": 128, "symmetric": False},
    "W4A16 per channel": {"m": 13, "bits": 4},
    "W4A32": {"m": 5, "bits": 4, "group": 128, "dtype": "float32"},
    "W8A16": {"m": 16, "bits": 8, "group": 128},
    "W8A16 per channel": {"m": 300, "bits": 8},
    "W8A8": {"m": 16, "bits": 8, "rounded": True},
    "W8A8 of float32": {"m": 300, "bits": 8, "rounded": True, "dtype": "float32"},
    "W4A8": {"m": 16, "bits": 4, "group": 128, "rounded": True},
    "W4A8, many tokens, zero points": {"m": 300, "bits": 4, "group": 128, "rounded": True, "symmetric": False},
}


def compiled(device, chip, names):
    """What the program prints of products with weights that are prepared for a chip, or for any."""
    cases = [json.dumps({"chip": chip, "k": K, "n": N, **PRODUCTS[name]}) for name in names]
    result = subprocess.run([sys.executable, PROGRAM, device, *cases], check=False, capture_output=True, text=True)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == len(cases), f"{names[len(lines)]} did not compile: {result.stderr[-3000:]}"
    return lines


@pytest.mark.parametrize(("device", "chip"), [("v5e", "v5e"), ("v6e", "v6e"), ("v4", None), ("tpu7x", None)])
def test_kernels_compile_and_weights_stay_packed(device, chip):
    names = list(PRODUCTS) if chip else list(PRODUCTS)[:3]
    for name, found in zip(names, compiled(device, chip, names), strict=True):
        product = PRODUCTS[name]
        number = 4 if "dtype" in product else 2  # bytes of an input and of a scale
        groups = K // product.get("group", K)
        weight = K * N * product["bits"] // 8 + groups * N * (number + (not product.get("symmetric", True)))
        x, padding = product["m"] * K * number, 16 * K * 4 + 8 * N * 2  # to whole tiles of memory: few rows, few scales
        assert found["kernels"] == 1, name
        assert weight <= found["arguments"] - x <= weight + padding, (name, found)
        assert found["temporary"] <= 2 * (x + padding), (name, found)  # no copy of the weight
