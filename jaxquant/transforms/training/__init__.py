"""Training with rounded numbers: fake quantization, learned ranges, adapters of quantized weights."""
