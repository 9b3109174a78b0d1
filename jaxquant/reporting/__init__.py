"""The report on a quantized checkpoint: measured by `collect`, laid out by `figures`, written by `page`."""
