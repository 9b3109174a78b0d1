"""Seconds of a whole step of training with rounded numbers, beside one of the float model.

    python benchmarks/qat_step.py [--out benchmarks/results/qat_step.json]

The packaged model on 8 x 256 tokens: cross-entropy, its gradient and AdamW; with rounded numbers also learned ranges
(LSQ) with an Adam of their own, and dampening, as `benchmarks/qat.py` trains. All take turns; medians, with compilation
and the first step left out.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import environment
import jax
import jax.numpy as jnp
import numpy as np
import optax
from qat import DAMPENING, RANGES, SPECS
from settings import model_to_train

import jaxquant as jq

SHAPE = 8, 256
ROUNDS = 9
RATE = 1e-5
ADAMW = optax.adamw(RATE)


def loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.mean(each)


def float_step(model) -> Callable:
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, tokens):
        params, moments = state
        value, gradient = jax.value_and_grad(lambda params: loss(model.apply(params, tokens), tokens))(params)
        updates, moments = ADAMW.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return step


def steps_and_states(model, params, tokens) -> dict[str, tuple[Callable, object]]:
    own = jax.tree.map(jnp.array, params)  # a step uses its state up
    found: dict[str, tuple[Callable, object]] = {"float": (float_step(model), (own, ADAMW.init(own)))}
    for name, spec in SPECS.items():
        fn = jq.fake_quantized(model.apply, model.recipe(jq.LSQ(spec)))
        optimizer = jq.qat_optimizer(ADAMW, ranges=RATE * RANGES)
        step = jq.train_step(fn, loss, optimizer, dampening=DAMPENING)
        found[name] = step, jq.train_state(fn, params, optimizer, tokens)
    return found


def measure() -> dict[str, float]:
    model, params = model_to_train()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, SHAPE), jnp.int32)
    running = steps_and_states(model, params, tokens)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(ROUNDS + 1):
        for name, (step, state) in running.items():
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, tokens))
            times[name].append(time.perf_counter() - start)
            running[name] = step, state
    return {name: float(np.median(taken[1:])) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    args = parser.parse_args()
    seconds = measure()
    rows = [f"| {name} | {taken:.3f} | {taken / seconds['float']:.2f} |" for name, taken in seconds.items()]
    print(environment.line(), "\n".join(["| | seconds | ÷ float |", "|---|---|---|", *rows]), sep="\n\n")
    if args.out:
        args.out.write_text(json.dumps({**environment.describe(), "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
