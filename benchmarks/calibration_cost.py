"""What calibration costs, against the forward pass and the Gram products that it cannot do without.

    python benchmarks/calibration_cost.py

The bound is the same forward pass, followed by the Gram matrix of each distinct product input of the same shapes, as
plain jitted JAX. (`calibrate` leaves out the product with the output head, which no statistics need, so it may take
less.) All run in turn, in one process; medians of ratios.
"""

import argparse
import time
from statistics import median

import environment
import jax
import jax.numpy as jnp
from jax import lax

import jaxquant as jq
from jaxquant import workflows

BATCH, TIME = 8, 512


def seconds(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def bound(model, params, tokens):
    """The forward pass, and one Gram product for each input of the packaged model's linear layers."""
    c = model.config
    widths = [c.hidden_size, c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size]
    keys = iter(jax.random.split(jax.random.key(0), c.num_layers * len(widths)))
    xs = [jax.random.normal(next(keys), (BATCH * TIME, k)) for _ in range(c.num_layers) for k in widths]

    @jax.jit
    def run(params, tokens, xs):  # of different arrays, or equal products would be computed once
        return model.apply(params, tokens), [jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST) for x in xs]

    return lambda: run(params, tokens, xs)


def main(rounds: int) -> None:
    model, params = jq.load_pretrained("tinylm", dtype="float32")
    text = workflows.TextSource("tinylm")
    samples = workflows.calibration_samples(model, text, None, BATCH * rounds, TIME).tokens
    batches = [jnp.asarray(samples[i : i + BATCH]) for i in range(0, len(samples), BATCH)]
    recipe = model.recipe(jq.RTN(jq.int4()))
    floor = bound(model, params, batches[0])

    def forward():
        return [model.apply(params, batch) for batch in batches]

    def bare():
        return [floor() for _ in batches]

    def whole(n):
        stats = jq.calibrate(model.apply, params, batches[:n], recipe=recipe)
        return [product.inputs for product in stats.products.values()]

    seconds(forward), seconds(bare)
    rows = []
    for _ in range(3):
        compile_and_one = seconds(lambda: whole(1))
        everything = seconds(lambda: whole(len(batches)))
        run = (everything - compile_and_one) * len(batches) / (len(batches) - 1)
        rows.append((seconds(forward), seconds(bare), run, compile_and_one))
    print(environment.line() + "\n")
    print("| | seconds | ÷ (forward + Gram) |\n|---|---|---|")
    names = ("forward", "forward + Gram products", "`calibrate`, run", "`calibrate`, trace + compile + one batch")
    for i, name in enumerate(names):
        ratio = f"{median(row[i] / row[1] for row in rows):.2f}" if i < 3 else ""
        print(f"| {name} | {median(row[i] for row in rows):.2f} | {ratio} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="batches of 8 × 512 tokens (default: %(default)s)")
    main(parser.parse_args().rounds)
