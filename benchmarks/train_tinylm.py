"""Trains the language model that ships in `jaxquant/models/tinylm`, on the text of Python's standard library.

    python benchmarks/train_tinylm.py --out DIR [--steps N] [--resume]

The tokenizer (byte-level BPE) and the model are trained on the "train" split of `jaxquant.evaluation.corpus`; the
reported loss is that of the "held_out" split. Matrices are updated by Muon, the embedding and the norms by AdamW, both
from optax. DIR receives `state.msgpack` (from which `--resume` continues), `tinylm/` (the model in Hugging Face's
format, weights in float16) and `train_tinylm.json` and `.png` (the loss curve); all are rewritten at every checkpoint.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from matplotlib.figure import Figure
from optax.contrib import MuonDimensionNumbers, muon
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxquant.evaluation.corpus import standard_library_text
from jaxquant.models.config import from_hf
from jaxquant.models.decoder import Decoder
from jaxquant.models.names import tensors_from_params

END_OF_TEXT = "<|endoftext|>"
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float16",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
}
CONFIG = from_hf(HF_CONFIG)
DECODER = Decoder(CONFIG, jnp.dtype("float32"))
CONTEXT = CONFIG.max_position_embeddings
BATCH = 4
WARM_UP = 100
STEPS_PER_POINT = 25
STEPS_PER_CHECKPOINT = 250
ROWS_AT_CHECKPOINT = 64


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Each document's token ids, the end-of-text token last."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return [np.array([*encoding.ids, end], np.int32) for encoding in tokenizer.encode_batch(texts)]


def packed_rows(documents: list[np.ndarray]) -> np.ndarray:
    """Documents one after another, cut into rows `[n, CONTEXT + 1]`; a row ends with the token that begins the next."""
    stream = np.concatenate(documents)
    starts = np.arange((len(stream) - 1) // CONTEXT) * CONTEXT
    return stream[starts[:, None] + np.arange(CONTEXT + 1)]


def training_batches(documents: list[np.ndarray], steps: int) -> np.ndarray:
    """All batches of a run, `[steps, BATCH, CONTEXT + 1]`; every pass packs the documents in a new order."""
    rng = np.random.default_rng(0)
    passes, needed = [], steps * BATCH
    while sum(map(len, passes)) < needed:
        rows = packed_rows([documents[i] for i in rng.permutation(len(documents))])
        passes.append(rng.permutation(rows))
    return np.concatenate(passes)[:needed].reshape(steps, BATCH, CONTEXT + 1)


def mean_loss(params, rows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats per token over `rows`, integer `[n, CONTEXT + 1]`."""
    logits = DECODER.apply({"params": params}, rows[:, :-1])
    # A masked sum in place of a gather: the gather's gradient is a scatter, which runs on one core.
    is_target = jnp.arange(CONFIG.vocab_size) == rows[:, 1:, None]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))


jitted_loss = jax.jit(mean_loss)


def make_optimizer(steps: int) -> optax.GradientTransformation:
    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(WARM_UP, steps // 2), steps, peak / 20)

    def stacked_kernels(params):
        return jax.tree.map(lambda leaf: MuonDimensionNumbers(1, 2) if leaf.ndim == 3 else None, params)

    return muon(
        schedule(0.02),
        weight_decay=0.05,
        adam_learning_rate=schedule(0.003),
        adam_b2=0.99,
        muon_weight_dimension_numbers=stacked_kernels,
    )


def make_step(optimizer: optax.GradientTransformation):
    def step(params, opt_state, rows):
        loss, gradients = jax.value_and_grad(mean_loss)(params, rows)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def held_out_loss(params, rows: np.ndarray) -> float:
    """Loss of the weights as they are shipped, in float16."""
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    rows = rows[: len(rows) // BATCH * BATCH].reshape(-1, BATCH, CONTEXT + 1)
    return float(np.mean([jitted_loss(rounded, batch) for batch in rows]))


def write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def export(out: Path, params, tokenizer: Tokenizer) -> None:
    """Writes the model in Hugging Face's format."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.json", json.dumps(HF_CONFIG, indent=2).encode() + b"\n")
    write_atomically(out / "tokenizer.json", tokenizer.to_str().encode())
    write_atomically(out / "tokenizer_config.json", json.dumps(TOKENIZER_CONFIG, indent=2).encode() + b"\n")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
    weights = save(tensors_from_params(CONFIG, rounded), metadata={"format": "pt"})
    write_atomically(out / "model.safetensors", weights)


def report(out: Path, state: dict, steps: int, facts: dict) -> None:
    """Writes the loss curve and what belongs to it as JSON and as a picture."""
    curve = np.asarray(state["curve"])
    held_out = np.asarray(state["held_out"])
    record = {
        **facts,
        "steps": int(state["step"]),
        "planned_steps": steps,
        "tokens": int(state["step"]) * BATCH * CONTEXT,
        "seconds": round(float(state["seconds"]), 1),
        "train_curve": {"tokens": curve[:, 0].astype(int).tolist(), "loss": curve[:, 1].round(4).tolist()},
        "held_out_curve": {"tokens": held_out[:, 0].astype(int).tolist(), "loss": held_out[:, 1].round(4).tolist()},
    }
    write_atomically(out / "train_tinylm.json", json.dumps(record, indent=1).encode() + b"\n")
    plot(out / "train_tinylm.png", curve, held_out)


def plot(path: Path, curve: np.ndarray, held_out: np.ndarray) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curve[:, 0] / 1e6, curve[:, 1], linewidth=1, label="train")
    axes.plot(held_out[:, 0] / 1e6, held_out[:, 1], "o-", markersize=4, label="held out")
    axes.set(xlabel="tokens (millions)", ylabel="nats per token", title="tinylm: 4.2 M parameters", ylim=(None, 6))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def initial_state(optimizer: optax.GradientTransformation) -> dict:
    """Everything a run needs to continue: the two curves have a row (tokens, loss) per point."""
    params = DECODER.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    empty = np.zeros((0, 2))
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": 0,
        "seconds": 0.0,
        "curve": empty,
        "held_out": empty,
    }


def train(state: dict, batches: np.ndarray, optimizer: optax.GradientTransformation):
    """Runs to the next checkpoint again and again, yielding the state at each."""
    step = make_step(optimizer)
    params, opt_state = state["params"], state["opt_state"]
    losses = []
    start = time.monotonic() - state["seconds"]
    for i in range(state["step"], len(batches)):
        params, opt_state, loss = step(params, opt_state, batches[i])
        losses.append(float(loss))
        done = i + 1
        if done % STEPS_PER_POINT == 0:
            point = [done * BATCH * CONTEXT, np.mean(losses)]
            state["curve"] = np.vstack([state["curve"], point])
            losses = []
        if done % STEPS_PER_CHECKPOINT == 0 or done == len(batches):
            state |= {"params": params, "opt_state": opt_state, "step": done, "seconds": time.monotonic() - start}
            yield state


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the language model in jaxquant/models/tinylm.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint, the model and the curve")
    parser.add_argument("--steps", type=int, default=3000, help=f"updates, of {BATCH * CONTEXT} tokens each")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "state.msgpack"

    train_texts, held_out_texts = standard_library_text("train"), standard_library_text("held_out")
    tokenizer = train_tokenizer(train_texts)
    documents, held_out = tokenize(tokenizer, train_texts), packed_rows(tokenize(tokenizer, held_out_texts))
    held_out_sample = held_out[:: len(held_out) // ROWS_AT_CHECKPOINT]
    facts = {
        "command": f"python benchmarks/train_tinylm.py --out DIR --steps {args.steps}",
        "device": f"{jax.devices()[0].device_kind} ({os.cpu_count()} cores)",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "tokens_in_one_pass": sum(map(len, documents)),
        "held_out_tokens": held_out[:, 1:].size,
        "held_out_tokens_per_byte": held_out[:, 1:].size / sum(len(text.encode()) for text in held_out_texts),
    }
    optimizer = make_optimizer(args.steps)
    start = initial_state(optimizer)
    if args.resume:
        start = serialization.from_bytes(start, checkpoint.read_bytes())
    for state in train(start, training_batches(documents, args.steps), optimizer):
        finished = state["step"] == args.steps
        loss = held_out_loss(state["params"], held_out if finished else held_out_sample)
        state["held_out"] = np.vstack([state["held_out"], [state["step"] * BATCH * CONTEXT, loss]])
        write_atomically(checkpoint, serialization.to_bytes(state))
        export(args.out / "tinylm", state["params"], tokenizer)
        report(args.out, state, args.steps, facts)
        print(f"step {state['step']}: train {state['curve'][-1, 1]:.3f}, held out {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
