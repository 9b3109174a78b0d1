"""Post-training quantization in JAX."""
