"""What benchmarks of quality share: kinds of weights, a way to call GPTQ, and checkpoints in one folder."""

from pathlib import Path

import jax

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


def model_to_train():
    """The packaged model and its parameters in float32; they are stored in half of that."""
    model, params = jq.load_pretrained("tinylm", dtype="float32")
    return model, jax.tree.map(lambda a: a.astype("float32"), params)


def checkpoint(folder: Path, setting: str, what: str) -> Path:
    """Where a checkpoint lies."""
    return folder / setting.replace(" ", "_") / what
