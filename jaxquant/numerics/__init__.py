"""Arrays in, arrays out: quantization formulas, the quantized tensor, bit packing, linear algebra."""
