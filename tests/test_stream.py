"""Block by block against the whole model at once, and what stays in memory meanwhile."""

import gc
import json
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from functions import normal

import jaxquant as jq
from jaxquant import workflows
from jaxquant.numerics.statistics import HELD_OUT_EVERY, token_hash
from jaxquant.transforms import memory
from jaxquant.transforms import stream as stream_module
from jaxquant.transforms.calibrate import Calibration, calibrate
from jaxquant.transforms.quantize import quantize_params
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.report import Report, stacked_reports
from jaxquant.transforms.stream import Stream

K, BLOCKS = 32, 3
CONFIG, NEAREST = jq.GPTQ(jq.int4(group_size=16)), jq.RTN(jq.int4(group_size=16))
NEAREST_INPUTS = jq.RTN(jq.int4(activations=jq.ActivationSpec(static=True)))  # of calibrated ranges
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


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


def run(stream, params):
    return [stream.quantize(p) for p in params]


@pytest.mark.parametrize("config", [CONFIG, NEAREST])
def test_blocks_behind_float_ones_get_the_codes_that_the_whole_model_gets(config):
    params = blocks()
    want, report = quantize_params(params, calibrate(whole, params, inputs()), config)
    done = run(Stream(block, config, inputs(), predecessors="float"), params)
    assert [bits_of(tree) for tree, _ in done] == [bits_of(tree) for tree in want]
    rows = [row for _, part in done for row in part.layers]
    assert [(r.error, r.rtn_error, r.tokens) for r in rows] == [(r.error, r.rtn_error, r.tokens) for r in report.layers]


def test_programs_are_compiled_in_another_thread_and_not_again(monkeypatch):
    params = {"up": normal(K, 2 * K, seed=1), "down": normal(2 * K, K, seed=2)}

    def compiled():
        jax.clear_caches()
        with compilations() as seen:
            Stream(block, CONFIG, inputs()).quantize(params, last=True)
        return seen

    beside = compiled()
    monkeypatch.setattr(stream_module, "compile_ahead", lambda jobs: [])
    alone = compiled()
    assert set(alone) == {threading.current_thread()}
    assert len(beside) == len(alone)
    assert sum(thread not in alone for thread in beside) == len(params)


def test_what_does_not_fit_is_said_before_calibration():
    begun = []
    stream = Stream(block, jq.GPTQ(jq.int4(group_size=24)), inputs())
    with pytest.raises(ValueError, match=r"'up': .*group_size=24"):
        stream.quantize(blocks()[0], progress=lambda *batches: begun.append(batches))
    assert not begun


def weight_by_weight(params, recipe):
    """Each calibrated by the whole function, in which those before it are quantized."""
    done = []
    for block_params in params:
        for name in ("up", "down"):

            def fn(p, x, before=tuple(done)):
                for q in before:
                    x = quantized(block)(q, x)
                return quantized(block)(p, x)

            stats = calibrate(fn, block_params, inputs(), recipe=[(name, recipe)])
            block_params, _ = quantize_params(block_params, stats, [(name, recipe)])
        done.append(block_params)
    return done


def test_weights_behind_quantized_ones_see_what_those_give():
    done = run(Stream(block, CONFIG, inputs()), blocks())
    want = weight_by_weight(blocks(), CONFIG)
    for (tree, report), expected in zip(done, want, strict=True):
        assert bits_of(tree) == bits_of(expected)
        assert [row.path for row in report.layers] == ["down", "up"]
        assert report.unchanged == ()
    behind_float = run(Stream(block, CONFIG, inputs(), predecessors="float"), blocks())
    assert bits_of(behind_float[0][0]["up"]) == bits_of(done[0][0]["up"])
    assert bits_of(behind_float[0][0]["down"]) != bits_of(done[0][0]["down"])


def test_rules_and_reports_are_those_of_the_block():
    """Of weights that are left, of shapes and bytes, and of a rule that takes nothing."""
    rules = [("up", None), (".*", CONFIG)]
    tree, report = Stream(block, rules, inputs()).quantize(blocks()[0])
    want, expected = quantize_params(blocks()[0], calibrate(block, blocks()[0], inputs()), rules)
    assert bits_of(tree) == bits_of(want)
    assert (report.unchanged, report.bytes_before, report.bytes_after) == (("up",), *sizes(expected))
    with pytest.raises(ValueError, match="recipe rule 'gate' takes no weight"):
        Stream(block, [("gate", CONFIG), ("up", CONFIG)], inputs()).quantize(blocks()[0])


def test_what_a_block_needs_is_said_before_it_is_quantized():
    """Two Gram matrices, one after the other; and x with what "up" gives, in place of x."""
    stream, (x, *_) = Stream(block, CONFIG, inputs()), inputs()
    needs = stream.prepare(blocks()[0], x)
    stats = calibrate(block, blocks()[0], [x])
    each = [memory.types_bytes(product.inputs) for product in stats.products.values()]
    assert (needs.held, needs.statistics) == (2 * x.nbytes, sum(each))
    assert needs.memory.parts["statistics"] == max(each)
    assert run(stream, blocks())  # the last input has another shape than x


def test_an_error_leaves_no_inputs_behind():
    """Which would be those of a product within the block."""
    stream = Stream(block, CONFIG, inputs())
    with pytest.raises(ValueError, match=r"'down': 1 of its .* entries are not finite"):
        stream.quantize({**blocks()[0], "down": normal(K, K).at[0, 0].set(jnp.nan)})
    with pytest.raises(ValueError, match="needs at least one batch, but `inputs` is empty, as it is after an error"):
        stream.quantize(blocks()[0])
    stream.inputs = inputs()
    want, _ = Stream(block, CONFIG, inputs()).quantize(blocks()[0])
    assert bits_of(stream.quantize(blocks()[0])[0]) == bits_of(want)
    with pytest.raises(ValueError, match="there are 2 masks for 3 inputs"):
        Stream(block, CONFIG, inputs(), masks=[None, None])


def prints(params, x):
    jax.debug.callback(lambda a: None, x[0, 0])
    return block(params, x)


def test_a_block_that_cannot_be_split_is_one_step():
    """Calibrated as it is, behind quantized blocks."""
    done = run(Stream(prints, CONFIG, inputs()), blocks()[:2])
    first, _ = quantize_params(blocks()[0], calibrate(block, blocks()[0], inputs()), CONFIG)
    assert bits_of(done[0][0]) == bits_of(first)
    stats = calibrate(lambda p, x: block(p, quantized(block)(first, x)), blocks()[1], inputs())
    assert bits_of(done[1][0]) == bits_of(quantize_params(blocks()[1], stats, CONFIG)[0])
    half, _ = quantize_params(blocks()[0], None, [("up", NEAREST)])
    tree, report = Stream(quantized(block), [("down", CONFIG)], inputs()).quantize(half)
    assert bits_of(tree["up"]) == bits_of(half["up"])
    assert ([row.path for row in report.layers], report.unchanged) == (["down"], ("up",))


def test_a_weight_that_sees_no_token_is_rounded_to_nearest():
    def fn(params, x):
        h = jnp.tanh(x @ params["up"])
        return jax.lax.cond(h[0, 0] > 2, lambda h: h @ params["down"], lambda h: h, h)

    tree, report = Stream(fn, CONFIG, inputs()).quantize(blocks()[0])
    assert {row.path: row.fallback for row in report.layers} == {"up": None, "down": "no calibration tokens"}
    want, _ = quantize_params(blocks()[0], None, NEAREST)
    assert bits_of(tree["down"]) == bits_of(want["down"])
    with pytest.raises(ValueError, match="no calibration token has finite inputs"):
        Stream(block, CONFIG, [jnp.full((8, K), jnp.nan)]).quantize(blocks()[0])


def test_lookups_within_a_block_are_quantized_too():
    def fn(params, x):
        return {**x, "h": x["h"] @ params["up"] + params["table"][x["ids"]]}

    params = {"up": normal(K, K), "table": normal(9, K)}
    x = {"h": normal(40, K), "ids": jnp.arange(40) % 9}
    rules = [("table", NEAREST), (".*", CONFIG)]
    tree, report = Stream(fn, rules, [x]).quantize(params)
    want, expected = quantize_params(params, calibrate(fn, params, [x]), rules)
    assert bits_of(tree) == bits_of(want)
    assert [row.path for row in report.layers] == [row.path for row in expected.layers] == ["table", "up"]


def sizes(report):
    return report.bytes_before, report.bytes_after


def test_bits_are_allocated_over_a_whole_block():
    """All weights of a `MixedPrecision` are of one stage: of an even budget, one may get more than the other."""
    mixed = jq.MixedPrecision(8, [jq.RTN(jq.int4(group_size=16)), jq.RTN(jq.int8(group_size=16))])
    params = {"up": normal(K, K), "down": 0.01 * normal(K, K, seed=1)}
    _, report = Stream(block, mixed, inputs()).quantize(params)
    _, expected = quantize_params(params, calibrate(block, params, inputs()), mixed)
    assert {row.path: row.bits for row in report.layers} == {row.path: row.bits for row in expected.layers}
    assert sorted(row.bits for row in report.layers) == [4, 8]


def test_a_predecessor_is_quantized_or_float():
    with pytest.raises(ValueError, match="predecessors='both' is not one of quantized, float"):
        Stream(block, CONFIG, inputs(), predecessors="both")


def test_padding_is_in_no_statistics():
    """Rows that the masks leave out may hold anything."""
    real = [jnp.arange(x.shape[0]) < x.shape[0] - 8 for x in inputs()]
    other = [jnp.where(r[:, None], x, 7.0) for x, r in zip(inputs(), real, strict=True)]
    for predecessors in ("quantized", "float"):
        found = [
            run(Stream(quantized(block), CONFIG, x, masks=masks, predecessors=predecessors), blocks())
            for x, masks in ((inputs(), real), (other, real), (other, None))
        ]
        trees = [[bits_of(tree) for tree, _ in done] for done in found]
        assert trees[0] == trees[1] != trees[2]
        assert found[0][2][1].layers[0].tokens + 24 == found[2][2][1].layers[0].tokens + held_out(real)


def test_padding_is_in_no_statistics_of_experts():
    """Which have rows of their own, in another order."""
    model = jq.Model.from_hf(SMALL | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3})
    params = model.init(jax.random.key(0))
    layer = {"layers": jax.tree.map(lambda a: a[:1], params["layers"]), "windows": model.blocks.windows[:1]}
    x, real = normal(2, 12, 32), jnp.arange(12) < jnp.array([[7], [12]])
    config = jq.RTN(jq.int8(activations=jq.ActivationSpec(static=True)))
    stream = Stream(model.blocks.apply, model.layer_rules(config), [x], masks=[real])
    _, report = stream.quantize(layer)
    assert report.notes == {}
    seen = {row.path: 0 for row in report.layers}
    for row in report.layers:
        seen[row.path] += row.tokens
    attention, experts = ({n for path, n in seen.items() if what in path} for what in ("self_attn", "experts"))
    assert attention == {19 - held_out([~real.reshape(-1)])}
    assert len(experts) == 1  # two for each token, of which other rows are held out
    assert 2 * 19 * (1 - 2 / HELD_OUT_EVERY) < experts.pop() <= 2 * 19


def held_out(real):
    """How many of the rows left out are held out of the sums anyway."""
    start, count = 0, 0
    for r in real:
        ranks = np.asarray(token_hash(jnp.arange(start, start + r.size)))
        count += int(np.sum(~np.asarray(r) & (ranks % HELD_OUT_EVERY == 0)))
        start += r.size
    return count


def test_methods_without_statistics_need_no_inputs():
    done = run(Stream(block, NEAREST, None), blocks())
    want, _ = quantize_params(blocks(), None, NEAREST)
    assert [bits_of(tree) for tree, _ in done] == [bits_of(tree) for tree in want]
    with pytest.raises(ValueError, match="'down': GPTQ needs calibration statistics"):
        run(Stream(block, CONFIG, None), blocks())


@pytest.mark.parametrize("predecessors", ["quantized", "float"])
def test_a_block_is_gone_when_the_next_is_read(monkeypatch, predecessors):
    kept: list[weakref.ref] = []
    original = Calibration.run

    def watched(*args):
        stats, results = original(*args)
        kept.extend(weakref.ref(product.inputs.gram) for product in stats.products.values())
        return stats, results

    def made(i):
        gc.collect()
        assert not [ref() for ref in kept if ref() is not None]
        params = {"up": normal(K, K, seed=i), "down": normal(K, K, seed=9 + i)}
        kept.extend(map(weakref.ref, params.values()))
        return params

    monkeypatch.setattr(Calibration, "run", watched)
    stream = Stream(quantized(block), NEAREST, inputs()[:1], predecessors=predecessors)
    for i in range(BLOCKS):
        stream.quantize(made(i))
    assert len(kept) == 4 * BLOCKS


def test_reports_on_layers_are_put_together():
    params = [jax.tree.map(lambda a: a[None], p) for p in blocks()]

    def scanned(params, x):
        return jax.lax.scan(lambda x, p: (block(p, x), None), x, params)[0]

    report = stacked_reports([r for _, r in run(Stream(scanned, NEAREST, inputs(), predecessors="float"), params)])
    stack = jax.tree.map(lambda *a: jnp.concatenate(a), *params)
    _, expected = quantize_params(stack, calibrate(scanned, stack, inputs()), NEAREST)
    assert [row.name for row in report.layers] == [row.name for row in expected.layers]
    assert (report.bytes_before, report.bytes_after) == (expected.bytes_before, expected.bytes_after)
    assert Report.from_dict(json.loads(report.to_json())) == report


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_checkpoints_get_the_codes_of_the_whole_model(family, tmp_path, monkeypatch):
    monkeypatch.setattr(workflows, "BATCH_TOKENS", 64)  # two batches
    config = SMALL | {"architectures": [f"{family}ForCausalLM"]}
    if family == "Qwen2":
        config |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    model = jq.Model.from_hf(config)
    params = model.init(jax.random.key(0))
    jq.save(tmp_path / "model", model, params)
    tokens = np.random.default_rng(0).integers(0, 64, (6, 16))
    np.save(tmp_path / "tokens.npy", tokens)
    options = {"calibration": str(tmp_path / "tokens.npy"), "num_samples": 6, "seq_len": 16, "predecessors": "float"}
    report = workflows.quantize_checkpoint(tmp_path / "model", tmp_path / "out", NEAREST, **options)
    _, loaded = jq.load_pretrained(tmp_path / "out")
    samples = list(workflows.batches(tokens))
    stats = calibrate(model.apply, params, samples)
    want, expected = quantize_params(params, stats, model.recipe(NEAREST))
    assert bits_of(loaded) == bits_of(want)
    assert [row.name for row in report.layers] == [row.name for row in expected.layers]
    assert (report.unchanged, report.bytes_before) == (expected.unchanged, expected.bytes_before)
    assert report.bytes_after == expected.bytes_after


def test_a_mesh_of_devices_gives_the_loss_of_one(tmp_path):
    """And nearly the same codes: sums over tokens come in another order, and float32 rounds them."""
    model = jq.Model.from_hf(SMALL)
    params = jax.tree.map(lambda a: 4 * a if a.ndim > 1 else a, model.init(jax.random.key(0)))
    jq.save(tmp_path / "model", model, params)
    tokens = np.random.default_rng(0).integers(0, 64, (8, 16))
    np.save(tmp_path / "tokens.npy", tokens)
    options = {"calibration": str(tmp_path / "tokens.npy"), "num_samples": 8, "seq_len": 16}
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    found = {}
    for name, devices in (("one", None), ("eight", mesh)):
        workflows.quantize_checkpoint(tmp_path / "model", tmp_path / name, NEAREST_INPUTS, mesh=devices, **options)
        data = {"data": options["calibration"], "context": 16, "mesh": devices}
        found[name] = workflows.evaluate_checkpoint(tmp_path / name, baseline=tmp_path / "model", **data).comparison
    assert abs(np.log(found["one"].perplexity) - np.log(found["eight"].perplexity)) < 5e-4
    assert found["one"].loss_increase.mean == pytest.approx(found["eight"].loss_increase.mean, abs=5e-4)
    assert abs(found["one"].loss_increase.mean) > 5e-3
