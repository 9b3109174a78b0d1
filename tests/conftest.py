"""Every test runs on eight virtual CPU devices, with strict dtype promotion."""

import importlib.metadata
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # thousands of small programs, each run a few times
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # two processes, each with threads that wait in loops, block each other
if importlib.metadata.version("jax").startswith("0.10."):  # half the time to compile, as in `compat.COMPILER_OPTIONS`
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True, scope="session")
def compilation_cache(tmp_path_factory):
    """Where programs are kept, once a module has ended, for others; each worker has its own."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Lets go of all programs when a module has ended.

    Each takes several mappings of memory, and a process may have no more than 65,530 on Linux: beyond, it crashes.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def standard_promotion():
    """Runs the tests of a module with standard dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def float64():
    """Runs a test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
