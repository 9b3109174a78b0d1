"""Every test runs on eight virtual CPU devices, with strict dtype promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def float64():
    """Runs a test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
