"""One matrix and the statistics of its input in, a QTensor out: one module per method, all of one shape.

A method is a hashable config with a `spec`, with `needs_statistics`, and with `quantize(w, stats) -> (QTensor, facts)`,
which JAX can trace and vmap. If it scales input channels it is one of `numerics.channel_scale.ScalesChannels` too; if
its code is the same for all bits it may say so (`numerics.bits`), and is compiled once for all of them.
"""
