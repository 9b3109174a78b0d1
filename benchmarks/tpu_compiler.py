"""Compiles the Mosaic TPU kernels on a machine without a TPU, by the compiler in the package libtpu.

As a program it takes a chip, and the arguments of `compiled` as JSON for each product, and prints a line of JSON with
the sizes of each program:

    python benchmarks/tpu_compiler.py v5e '{"chip": "v5e", "m": 16, "k": 4096, "n": 4096, "bits": 4, "group": 128}'

A compiler that fails may abort the process.
"""

import json
import os
import re
import sys
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jaxquant as jq
from jaxquant.kernels.matmul import quantized_matmul

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
HERMETIC = {  # read when libtpu is loaded: it asks no server what it runs on, and lets other processes load it too
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def device_of(chip: str, estimates: Path | None = None):
    """A device to compile for, once a process; the compiler writes estimates of cycles to the folder, if any."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    flags = {} if estimates is None else {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={estimates}"}
    os.environ.update(HERMETIC | flags)
    return topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]


def compiled(
    device, chip: str | None, m: int, k: int, n: int, bits: int, group: int | None = None, rounded=False,
    symmetric=True, dtype="bfloat16", layers: int | None = None,
):  # fmt: skip
    """The program of a product `[m, k] · [k, n]` with a prepared weight, or of a scan over `layers` of them."""
    spec = jq.QuantSpec(bits, group, symmetric, activations=jq.ActivationSpec() if rounded else None)
    lead = () if layers is None else (layers,)
    w = jax.ShapeDtypeStruct((*lead, k, n), dtype)
    q = jax.eval_shape(lambda w: jq.prepare(jq.quantize(w, spec), "tpu", chip), w)
    x = jax.ShapeDtypeStruct((m, k), dtype)
    there = SingleDeviceSharding(device)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), (x, q))

    def product(x, q):
        return quantized_matmul(x, q, implementation="mosaic_tpu")

    def scanned(x, q):
        return jax.lax.scan(lambda x, q: (product(x, q), None), x, q)[0]

    run = jax.jit(product if layers is None else scanned)
    return run.trace(*args).lower(lowering_platforms=("tpu",)).compile()


def cycles_in(folder: Path) -> int:
    """The cycles that the compiler has estimated since the last call."""
    total = 0
    for path in folder.glob("*.textproto"):
        total += sum(int(c) for c in re.findall(r"estimated_cycles: (\d+)", path.read_text()))
        path.unlink()
    return total


def sizes(program) -> dict[str, int]:
    """Bytes of a program's arguments and of what it keeps besides, and the calls of kernels in it."""
    memory = program.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
    }


if __name__ == "__main__":
    target, *cases = sys.argv[1:]
    device = device_of(target)
    for case in cases:
        print(json.dumps(sizes(compiled(device, **json.loads(case)))), flush=True)
