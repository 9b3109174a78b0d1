"""Block by block against the whole model at once, and what stays in memory meanwhile."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from samples import statistics_of

import jaxquant as jq
from jaxquant import workflows
from jaxquant.kernels.matmul import quantized_matmul
from jaxquant.transforms.calibrate import Calibration, calibrate
from jaxquant.transforms.quantize import quantize_params
from jaxquant.transforms.stream import quantize_blocks, stack_blocks

K, BLOCKS = 32, 3
CONFIG, NEAREST = jq.GPTQ(jq.int4(group_size=16)), jq.RTN(jq.int4(group_size=16))


def block(params, x):
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


def whole(params, x):
    for p in params:
        x = block(p, x)
    return x


def blocks():
    return [{"up": normal(K, K, seed=i), "down": normal(K, K, seed=9 + i)} for i in range(BLOCKS)]


def inputs():
    return [normal(40, K), normal(40, K, seed=1), normal(24, K, seed=2)]


def bits_of(tree):
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


@pytest.mark.parametrize("config", [CONFIG, NEAREST])
def test_blocks_get_the_codes_that_the_whole_model_gets(config):
    params = blocks()
    want, report = quantize_params(params, calibrate(whole, params, inputs()), config)
    done = list(quantize_blocks(block, iter(params), iter(inputs()), config))
    assert [bits_of(tree) for tree, _ in done] == [bits_of(tree) for tree in want]
    rows = [row for _, part in done for row in part.layers]
    assert [(r.error, r.rtn_error, r.tokens) for r in rows] == [(r.error, r.rtn_error, r.tokens) for r in report.layers]


def test_methods_without_statistics_need_no_inputs():
    done = list(quantize_blocks(block, blocks(), None, NEAREST))
    want, _ = quantize_params(blocks(), None, NEAREST)
    assert [bits_of(tree) for tree, _ in done] == [bits_of(tree) for tree in want]
    with pytest.raises(ValueError, match="'down': GPTQ needs calibration statistics"):
        list(quantize_blocks(block, blocks(), None, CONFIG))


def test_a_block_is_gone_when_the_next_is_read(monkeypatch):
    kept: list[weakref.ref] = []
    run = Calibration.run

    def watched(*args):
        stats, results = run(*args)
        kept.extend(weakref.ref(product.inputs.gram) for product in stats.products.values())
        return stats, results

    def made(i):
        params = {"up": normal(K, K, seed=i), "down": normal(K, K, seed=9 + i)}
        kept.extend(map(weakref.ref, params.values()))
        return params

    def read():
        for i in range(BLOCKS):
            gc.collect()
            assert not [ref() for ref in kept if ref() is not None]
            yield made(i)

    monkeypatch.setattr(Calibration, "run", watched)
    done = list(quantize_blocks(block, read(), inputs()[:1], NEAREST))
    assert (len(done), len(kept)) == (BLOCKS, 4 * BLOCKS)


def test_parts_of_a_stack_are_put_together():
    params = [jax.tree.map(lambda a: a[None], p) for p in blocks()]

    def scanned(params, x):
        return jax.lax.scan(lambda x, p: (block(p, x), None), x, params)[0]

    tree, report = stack_blocks(list(quantize_blocks(scanned, params, inputs(), NEAREST)))
    stack = jax.tree.map(lambda *a: jnp.concatenate(a), *params)
    want, expected = quantize_params(stack, calibrate(scanned, stack, inputs()), NEAREST)
    assert bits_of(tree) == bits_of(want)
    assert [row.name for row in report.layers] == [row.name for row in expected.layers]
    assert (report.bytes_before, report.bytes_after) == (expected.bytes_before, expected.bytes_after)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_checkpoints_get_the_codes_of_the_whole_model(family, tmp_path, monkeypatch):
    monkeypatch.setattr(workflows, "BATCH_TOKENS", 64)  # two batches
    config = {
        "architectures": [f"{family}ForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if family == "Qwen2":
        config |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    model = jq.Model.from_hf(config)
    params = model.init(jax.random.key(0))
    jq.save(tmp_path / "model", model, params)
    tokens = np.random.default_rng(0).integers(0, 64, (6, 16))
    np.save(tmp_path / "tokens.npy", tokens)
    options = {"calibration": str(tmp_path / "tokens.npy"), "num_samples": 6, "seq_len": 16}
    report = workflows.quantize_checkpoint(tmp_path / "model", tmp_path / "out", NEAREST, **options)
    _, quantized = jq.load_pretrained(tmp_path / "out")
    samples = list(workflows.batches(tokens))
    stats = calibrate(model.apply, params, samples)
    want, expected = quantize_params(params, stats, model.recipe(NEAREST))
    assert bits_of(quantized) == bits_of(want)
    assert [row.name for row in report.layers] == [row.name for row in expected.layers]
    assert (report.unchanged, report.bytes_before) == (expected.unchanged, expected.bytes_before)
    assert report.bytes_after == expected.bytes_after


def test_layers_may_keep_different_numbers_of_outliers():
    x = jnp.asarray(inputs()[0]).at[:, :10].multiply(20.0)
    made = []
    for i, outliers in enumerate((8, 16)):
        stats = statistics_of(np.asarray(x)[None])
        q, _ = jax.vmap(jq.LLMInt8(threshold=3.0, outliers=outliers).quantize)(normal(1, K, K, seed=i), stats)
        made.append(q)
    empty = jq.Report((), (), {}, 0, 0)
    stack, _ = stack_blocks([({"w": q}, empty) for q in made])
    stack["w"].validate()
    assert stack["w"].outlier_index.shape == (2, 16, 1)
    np.testing.assert_array_equal(jq.dequantize(stack["w"]), np.concatenate([jq.dequantize(q) for q in made]))
    each = np.concatenate([quantized_matmul(x[None], q) for q in made])
    np.testing.assert_allclose(quantized_matmul(jnp.stack([x, x]), stack["w"]), each, rtol=1e-5, atol=1e-4)
