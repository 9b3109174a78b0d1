"""What benchmarks of quality share: kinds of weights, a way to call GPTQ, and checkpoints in one folder."""

from pathlib import Path

import jaxquant as jq

SPECS = {
    "W4 g128": jq.int4(group_size=128),
    "W3 g128": jq.int3(group_size=128),
    "W3 per channel": jq.int3(),
    "W2 g64 asymmetric": jq.QuantSpec(bits=2, group_size=64, symmetric=False),
}
REFINED = {"clip": "diagonal", "refine": 6}  # what the tables call refined GPTQ
TOKENS = "tokens.npy"  # for calibration
LEARNED = "jaxquant, learned rounding"
TRAINED = "jaxquant, trained on own text"


def checkpoint(folder: Path, setting: str, what: str) -> Path:
    """Where a checkpoint lies."""
    return folder / setting.replace(" ", "_") / what
