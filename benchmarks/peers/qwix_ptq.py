"""Rounds the packaged model with qwix, and evaluates it; run in an environment that has qwix, and jaxquant on its path.

    python qwix_ptq.py WINDOWS.npy LOSSES.npy

The model is jaxquant's Flax module, layers not stacked; all its linear layers but the output head get 4 bits in groups
of 128. Writes and prints what `torch_ptq.py` does.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import qwix

import jaxquant as jq
from jaxquant.models.decoder import Decoder
from jaxquant.models.stacking import unstack_layers


def main(windows: str, out: str) -> None:
    start = time.perf_counter()
    model, params = jq.load_pretrained("tinylm", dtype="float32")
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), unstack_layers(params))
    rule = qwix.QuantizationRule(module_path=".*_proj", weight_qtype="int4", tile_size=128)
    decoder = qwix.quantize_model(Decoder(model.config, model.dtype, stacked=False), qwix.PtqProvider([rule]))
    tokens = np.load(windows).astype(np.int32)
    types = jax.eval_shape(decoder.init, jax.random.key(0), tokens[:1])["params"]
    params = jax.block_until_ready(qwix.quantize_params(params, types))
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())

    @jax.jit
    def losses(params, batch):
        logs = jax.nn.log_softmax(decoder.apply({"params": params}, batch)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logs, batch[:, 1:, None], -1)[..., 0], -1)

    np.save(out, np.concatenate([losses(params, batch) for batch in tokens.reshape(-1, 8, tokens.shape[1])]))
    peak = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "version": metadata.version("qwix")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
