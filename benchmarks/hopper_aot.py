"""Compiles every tile of the Hopper kernels to machine code, on a machine without a GPU, and says what came out.

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt \
        nvidia-cuda-nvdisasm
    python benchmarks/hopper_aot.py

Versions of the first two must be that of JAX, which must be 0.11 or later; no driver is needed. It fails where a kernel
spills registers, has no tensor core instructions (HGMMA), or does not fit in shared memory.
"""

import argparse
import itertools
import os
import re
import tempfile
from pathlib import Path

FOLDER = tempfile.TemporaryDirectory(prefix="mosaic_gpu_")
DUMPS = Path(FOLDER.name)
os.environ.update(JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_TO=FOLDER.name)  # read when JAX is imported

import environment  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

import jaxquant as jq  # noqa: E402
from jaxquant.kernels.matmul import quantized_matmul  # noqa: E402
from jaxquant.kernels.tuning import GPU_TILES, gpu_tiles  # noqa: E402

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
TOKENS = [8, 16, 32, 64, 512]
WEIGHTS = {
    "W4 g128": jq.int4(group_size=128),
    "W4 g64": jq.int4(group_size=64),
    "W4 g128 asymmetric": jq.int4(group_size=128, symmetric=False),
    "W4 per channel": jq.int4(),
    "W8 g128": jq.int8(group_size=128),
    "W8 per channel": jq.int8(),
}
SHAPES = [(4096, 4096), (4096, 4224), (8192, 28672)]  # K, N: split and whole tiles, of two and of four warpgroups


def shapes_on(device, chip, k, n, m, spec, dtype):
    """Shapes of an input and a prepared weight."""
    w = jax.ShapeDtypeStruct((k, n), dtype)
    q = jax.eval_shape(lambda w: jq.prepare(jq.quantize(w, spec), "gpu", chip), w)
    x = jax.ShapeDtypeStruct((m, k), dtype)
    there = SingleDeviceSharding(device)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), (x, q))


def registers_in(assembly: str) -> tuple[int, int]:
    """Registers that the warpgroups use which multiply and which load; each must stay below what it asks for."""
    found = []
    for part in re.split(r"USETMAXREG", assembly)[1:]:
        asked = int(re.search(r"0x([0-9a-f]+)", part)[1], 16)
        used = 1 + max(int(n) for n in re.findall(r"\bR(\d+)\b", part))
        assert used <= asked, f"a warpgroup uses {used} registers and asks for {asked}"
        found.append((asked, used))
    (_, loading), (_, multiplying) = sorted(found)
    return multiplying, loading


def compiled(device, chip, k, n, m, spec, dtype) -> dict:
    """What the assembler says of the kernel for a product."""
    before = set(DUMPS.iterdir())
    run = jax.jit(lambda x, q: quantized_matmul(x, q, implementation="mosaic_gpu"))
    run.trace(*shapes_on(device, chip, k, n, m, spec, dtype)).lower(lowering_platforms=("cuda",)).compile()
    new = {path.suffix: path.read_text() for path in set(DUMPS.iterdir()) - before}
    told = new[".ptxas"]
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", told))
    multiplying, loading = registers_in(new[".sass_ctrl"])
    return {
        "registers": multiplying,
        "loading": loading,
        "spilled bytes": spills,
        "HGMMA": len(re.findall(r"\bHGMMA\.", new[".sass_ctrl"])),
    }


def row_of(device, chip, tokens, k, n) -> dict:
    """All kinds of weights for one tile: the worst of them."""
    tiles = gpu_tiles(chip, tokens, n)
    kinds = itertools.product(WEIGHTS.values(), (jnp.bfloat16, jnp.float16))
    found = [compiled(device, chip, k, n, tokens, spec, dtype) for spec, dtype in kinds]
    return {
        "tile": f"{tiles.tile_m} × {tiles.tile_n}",
        "M × K × N": f"{tokens} × {k} × {n}",
        "kernels": len(found),
        **{name: max(kernel[name] for kernel in found) for name in ("registers", "loading", "spilled bytes")},
        "fewest HGMMA": min(kernel["HGMMA"] for kernel in found),
    }


def main(args) -> None:
    device = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=TARGET).devices[0]
    print(environment.line() + "\n")
    rows = []
    for tokens, (k, n) in itertools.product(TOKENS, SHAPES):
        rows.append(row_of(device, args.chip, tokens, k, n))
        if len(rows) == 1:
            print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    if bad := [row for row in rows if row["spilled bytes"] or not row["fewest HGMMA"]]:
        raise SystemExit(f"kernels spill registers or have no HGMMA: {bad}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", default="h200", choices=GPU_TILES, help="default: %(default)s")
    main(parser.parse_args())
