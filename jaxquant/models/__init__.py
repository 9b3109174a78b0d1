"""Reference decoders in Flax, and how a checkpoint's tensors become their parameters."""

from pathlib import Path

# A small model that is part of the package, in Hugging Face's format; `benchmarks/train_tinylm.py` trained it.
TINYLM = Path(__file__).parent / "tinylm"
