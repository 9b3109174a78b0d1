"""Follows chosen weights through any JAX function, to the products that consume them."""
