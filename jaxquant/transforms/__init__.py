"""Functions and parameter trees: calibrate, quantize, run quantized."""
