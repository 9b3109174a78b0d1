"""One matrix and the statistics of its input in, a QTensor out: one module per method, all of one shape."""
