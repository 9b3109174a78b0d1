"""Training with rounded numbers beside rounding after training, on the packaged model and held-out text.

    python benchmarks/qat.py [--steps N] [--settings NAME ...] [--work FOLDER] [--out benchmarks/results/qat.json]

Each setting is rounded to nearest (RTN), by GPTQ with refinement, by rounding learned from there on, and trained from
there on, with learned ranges (LSQ) and dampening; no rounding is learned where inputs are rounded too. The loss of
training is the divergence from the frozen float model, which knows no labels: the float model itself, trained so on the
same tokens, stays what it is, so nothing is earned by going on with pretraining. Increase of the loss and divergence
are measured on held-out text; `recovered` is the share of RTN's divergence that is gone, and `of GPTQ` that of what
GPTQ leaves. With a folder, what is quantized before training is kept there, and the state of the training: what was
stopped goes on from them, also on another machine. `benchmarks/qat_step.py` times one step.
"""

import argparse
import functools
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import rounding
from settings import REFINED, model_to_train

import jaxquant as jq
from jaxquant import workflows

SPECS = {
    "W4A8": jq.int4(activations=jq.ActivationSpec()),
    "W3 g128": jq.int3(group_size=128),
    "W2 g64": jq.QuantSpec(bits=2, group_size=64, symmetric=False),
}
RATES = {"W4A8": 4e-4, "W3 g128": 6e-4, "W2 g64": 2e-3}  # of the weights; half is worse at 3 and 2 bits, twice at all
RANGES = 0.01  # of that rate; at 1/4, the scales of 4-bit weights move all codes so much that the loss rises
EMBEDDING = 1 / 3  # of that rate; the embedding, which is the head too, stays in float
DAMPENING = 0.006  # at the highest rate
BATCH, LENGTH = 4, 512
SHOWN = 20  # steps whose losses are one number
KEPT = 120.0  # seconds from one state that is kept to the next
CALIBRATION = 128, 512
WINDOWS, CONTEXT = 64, 512
ROUNDING_STEPS, ROUNDING_RATE = 100, 5e-3


def batches(text: workflows.TextSource, steps: int) -> np.ndarray:
    """Token ids `[steps, BATCH, LENGTH]` from the text that the model was trained on, in random places."""
    stream = text.corpus("train", 10**9)
    starts = np.random.default_rng(0).integers(0, len(stream) - LENGTH, (steps, BATCH, 1))
    return stream[starts + np.arange(LENGTH)]


def distilled(model, logits, tokens, teacher) -> jax.Array:
    return jq.distillation_loss(logits, model.apply(teacher, tokens))


class States:
    """The newest state of a training, kept in a folder; without one, none is."""

    def __init__(self, folder: Path | None):
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self.manager = None if folder is None else ocp.CheckpointManager(folder.absolute(), options=options)
        self.last = time.monotonic()

    def newest(self, state) -> tuple[Any, list[float]]:
        """The state that was kept and the losses until then, or the one given."""
        if self.manager is None or self.manager.latest_step() is None:
            return state, []
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(state), seen=ocp.args.JsonRestore())
        found = self.manager.restore(self.manager.latest_step(), args=wanted)
        return found.state, found.seen["losses"]

    def keep(self, state, losses: list[float]) -> None:
        if self.manager is not None and time.monotonic() - self.last > KEPT:
            seen = ocp.args.JsonSave({"losses": losses})
            self.manager.save(len(losses), args=ocp.args.Composite(state=ocp.args.StandardSave(state), seen=seen))
            self.manager.wait_until_finished()  # the next step uses the state up
            self.last = time.monotonic()


def trained(model, params, qparams, spec, rate: float, data: np.ndarray, work: Path | None):
    """What training makes of quantized parameters in one step per batch, and the losses."""
    recipe = model.recipe(jq.LSQ(spec))
    # `start_from` leaves a weight as near to where it is as its code allows, which is as good as the middles that the
    # tables of `benchmarks/README.md` begin with (W3, 240 steps: a KL of .0256, from the middles .0260)
    middles = jq.dequantize_params(qparams)
    fn = jq.fake_quantized(model.apply, recipe)
    schedule = functools.partial(optax.warmup_cosine_decay_schedule, 0.0, decay_steps=len(data), end_value=0.0)
    warm_up = len(data) // 20
    optimizer = jq.qat_optimizer(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule(rate, warm_up), b2=0.99, weight_decay=0.0)),
        ranges=schedule(rate * RANGES, warm_up),
        rules=[("params/embed_tokens/.*", optax.adam(schedule(rate * EMBEDDING, warm_up), b2=0.99))],
    )
    states = States(work)
    state, losses = states.newest(jq.start_from(jq.train_state(fn, middles, optimizer, data[0]), qparams))
    pull = schedule(DAMPENING, warm_up)  # as the rate, so that where a weight comes to rest stays the same
    step = jq.train_step(fn, functools.partial(distilled, model), optimizer, dampening=pull)

    def watch(state, loss):
        losses.append(loss)
        states.keep(state, losses)
        if len(losses) % SHOWN == 0:
            print(f"  step {len(losses)}: {np.mean(losses[-SHOWN:]):.4f}", flush=True)

    state = jq.train(step, state, map(jnp.asarray, data[len(losses) :]), params, watch=watch)
    return jq.convert(state.params, state.qat, recipe), losses


def kept(folder: Path | None, name: str, model, make: Callable[[], Any]) -> Any:
    """The parameters that `make` gives, or those that an earlier run has kept in the folder."""
    if folder is None:
        return make()
    if not (folder / name).exists():
        jq.save(folder / name, model, make())
    return jq.load_pretrained(folder / name, dtype="float32")[1]


def check_same(folder: Path, settings: dict) -> None:
    """Keeps in the folder what its contents are made with; stops where that was something else."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        file.write_text(json.dumps(settings))
    if json.loads(file.read_text()) != settings:
        raise SystemExit(f"{folder} holds what was made with other settings than {settings}; use a new folder")


def rounded(model, params, stats: Callable[[], Any], samples, spec, work: Path | None) -> dict[str, Any]:
    """The parameters that methods without training give; where rounding is learned, it goes on from GPTQ's."""

    def quantized(config):
        return jq.quantize_params(params, stats(), model.recipe(config))[0]

    refined = jq.GPTQ(spec, **REFINED)
    if work is not None:
        check_same(work, {"spec": repr(spec), "gptq": repr(refined), "rounding": [ROUNDING_STEPS, ROUNDING_RATE]})
    found = {"RTN": kept(work, "rtn", model, lambda: quantized(jq.RTN(spec)))}
    found["GPTQ refined"] = start = kept(work, "gptq", model, lambda: quantized(refined))
    if spec.activations is None:
        learned = functools.partial(
            rounding.learned, model, params, start, samples, steps=ROUNDING_STEPS, rate=ROUNDING_RATE
        )
        found["then learned rounding"] = kept(work, "learned", model, learned)
    return found


def measure(steps: int, settings: list[str], out: Path, work: Path | None) -> dict:
    """Everything; what is done is written after each setting."""
    model, params = model_to_train()
    text = workflows.TextSource("tinylm")
    data = batches(text, steps)
    samples = workflows.calibration_samples(model, text, None, *CALIBRATION).tokens
    held_out = text.corpus("held_out", WINDOWS * CONTEXT)
    stats = functools.cache(lambda: jq.calibrate(model.apply, params, workflows.batches(samples)))
    results: dict[str, dict] = {}
    how = {"rates": {name: RATES[name] for name in settings}, "ranges": RANGES, "dampening": DAMPENING}
    measured = {"steps": steps, "batch": data.shape[1:], **how, "results": results}
    for name in settings:
        own = None if work is None else work / name.replace(" ", "_")
        if own is not None:
            rates = [RATES[name], RANGES, EMBEDDING, DAMPENING]
            check_same(own / "training", {"shape": [*data.shape], "text": zlib.crc32(data.tobytes()), "rates": rates})
        row = results.setdefault(name, {})
        for method, qparams in rounded(model, params, stats, samples, SPECS[name], own).items():
            row[method] = compared(model, qparams, params, held_out, f"{name} {method}")
        states = own and own / "training" / "states"
        found, losses = trained(model, params, qparams, SPECS[name], RATES[name], data, states)
        means = [float(np.mean(losses[i : i + SHOWN])) for i in range(0, len(losses), SHOWN)]
        row["then QAT"] = {**compared(model, found, params, held_out, f"{name} then QAT"), "losses": means}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**environment.describe(), **measured}, indent=1) + "\n")
    return measured


def compared(model, qparams, params, tokens, what: str) -> dict[str, Any]:
    found = jq.compare(model.apply, qparams, params, tokens, context=CONTEXT)
    print(f"{what}: KL {found.kl.mean:.4f}, loss +{found.loss_increase.mean:.4f}", flush=True)
    return found._asdict()


def tables(measured: dict) -> str:
    lines = ["| | | loss increase | KL | recovered | of GPTQ |", "|---" * 6 + "|"]
    for name, row in measured["results"].items():
        worst, other = (row[method]["kl"].mean for method in ("RTN", "GPTQ refined"))
        for method, found in row.items():
            loss, kl = found["loss_increase"], found["kl"]
            gone = f"{1 - kl.mean / worst:.0%} | {1 - kl.mean / other:.0%}"
            lines.append(f"| {name} | {method} | {loss.mean:.4f} ± {loss.stderr:.4f} | {kl.mean:.4f} | {gone} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--settings", nargs="+", choices=list(SPECS), default=list(SPECS))
    parser.add_argument("--work", type=Path, help="keep what is quantized and the state of the training here")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "qat.json")
    args = parser.parse_args()
    print(environment.line(), tables(measure(args.steps, args.settings, args.out, args.work)), sep="\n\n")


if __name__ == "__main__":
    main()
