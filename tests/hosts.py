"""One of two processes with four devices each, which quantize one model together.

    python hosts.py PORT NUMBER OUT

The first one writes what came out to OUT, an .npz file.
"""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)

if __name__ == "__main__":
    port, number, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
    from functions.cases import normal
    from meshes import SPLIT, P, mesh_of, model, params_of

    import jaxquant as jq
    from jaxquant.transforms.meshes import fetched

    assert (len(jax.devices()), len(jax.local_devices())) == (8, 4)
    mesh = mesh_of()

    def place(a, spec):
        a = np.asarray(a, np.float64)
        return jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda at: a[at])

    params = {name: place(a, SPLIT[name]) for name, a in params_of().items()}
    stats = jq.calibrate(model, params, [place(normal(8, 64, 16, seed=i), P("data")) for i in range(2)])
    qparams, report = jq.quantize_params(params, stats, jq.GPTQ(jq.int4(group_size=8)))
    assert qparams["up"].values.sharding.spec[-1] == ("data", "model")
    found = {name: q.codes for name, q in qparams.items()}

    def logits(params, tokens):
        return jq.quantized(model)(params, jax.nn.one_hot(tokens, 16))

    tokens = np.random.default_rng(0).integers(0, 16, 130)
    found["perplexity"] = np.asarray(jq.perplexity(logits, qparams, tokens, context=8))
    found["errors"] = np.array([row.error for row in report.layers])
    found = fetched(found)
    if number == 0:
        np.savez(out, **found)
