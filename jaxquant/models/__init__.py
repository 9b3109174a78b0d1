"""Reference decoders in Flax, and how a checkpoint's tensors become their parameters."""
