"""Estimates of memory before work, and refusals."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from functions import normal

from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.bits import split_bits
from jaxquant.numerics.spec import int4, int8
from jaxquant.transforms import calibrate as calibrate_module
from jaxquant.transforms import memory
from jaxquant.transforms import programs as programs_module
from jaxquant.transforms import quantize as quantize_module
from jaxquant.transforms.calibrate import _Program, calibrate
from jaxquant.transforms.jobs import chunks
from jaxquant.transforms.programs import needed_memory
from jaxquant.transforms.quantize import quantize_params

T, K, N = 64, 32, 48


def attention(params, x):
    return jnp.tanh(x @ params["q"]) * (x @ params["k"]) + x @ params["v"]


def attention_params():
    return {name: normal(K, N, seed=i) for i, name in enumerate("qkv")}


def layers(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def parts(fn, params, batch, recipe=None):
    return _Program(fn, params, batch, None, recipe).memory(params, batch, None, begun=False).parts


def site(k):
    """Bytes of the moments of an input: Gram matrix, sums, minima, maxima, 128 held-out rows and ranks, two counts."""
    return 4 * (k * k + 3 * k + 128 * k + 128 + 2)


def test_weights_that_share_an_input_are_counted_once():
    x = normal(T, K)
    assert parts(attention, attention_params(), x)["statistics"] == site(K)
    apart = lambda p, x: x @ p["q"] + (2 * x) @ p["k"] + (3 * x) @ p["v"]  # noqa: E731
    assert parts(apart, attention_params(), x)["statistics"] == 3 * site(K)
    only = parts(apart, attention_params(), x, [("q", RTN(int8())), ("k|v", None)])
    assert only["statistics"] == site(K)


def test_lookups_keep_no_statistics():
    params = {"table": normal(1000, K), "w": normal(K, N)}
    found = parts(lambda p, ids: p["table"][ids] @ p["w"], params, jnp.arange(T))
    assert found["statistics"] == site(K)


def test_grows_with_layers_and_with_sequence_length():
    few, many = ({"w": normal(count, K, K)} for count in (2, 8))
    short, long = normal(T, K), normal(64 * T, K)
    assert parts(layers, few, short)["statistics"] == 2 * site(K)
    assert parts(layers, many, short)["statistics"] == 8 * site(K)
    assert parts(layers, few, long)["statistics"] == 2 * site(K)
    assert parts(layers, few, short)["activations or results"] >= 2 * site(K)
    assert parts(layers, few, long)["activations or results"] > 4 * 64 * T * K


def test_arguments_in_numpys_memory_are_copied():
    params = {"w": np.asarray(normal(2, K, K))}
    assert parts(layers, params, normal(T, K))["copies of arguments"] == params["w"].nbytes
    assert "copies of arguments" not in parts(layers, {"w": normal(2, K, K)}, normal(T, K))


def test_what_is_held_already_is_not_counted_again(monkeypatch):
    """The sums over batches of one shape are held when the first batch of another shape comes."""
    seen = []
    monkeypatch.setattr(calibrate_module.memory, "ensure_fits", lambda estimate, *_: seen.append(estimate.parts))
    calibrate(attention, attention_params(), [normal(T, K), normal(T, K), normal(2 * T, K)])
    assert [part.get("statistics", 0) for part in seen] == [site(K), 0]


@pytest.fixture(scope="module")
def calibrated():
    params = {**attention_params(), "o": normal(5, N, K)}
    stats = calibrate(lambda p, x: attention(p, x) @ p["o"][0], params, [normal(40 * T, K)])
    return params, stats


def test_quantized_weights_are_counted(calibrated):
    params, _ = calibrated
    for config in (RTN(int8()), RTN(int4(group_size=8))):
        tree, _ = quantize_params(params, None, config)
        estimate = needed_memory(quantize_module.plan(params, None, config))
        assert estimate.parts["quantized weights"] == sum(a.nbytes for a in jax.tree.leaves(tree))
        assert estimate.parts["matrices at work"] >= sum(a.nbytes for a in jax.tree.leaves(params)) / 2


def test_codes_that_are_packed_afterwards_are_counted_and_no_others(calibrated):
    """Of one matrix by RTN: what is given and what is kept, and for 4 bits the codes before they are packed."""
    w = normal(3, N, K)[0]
    for config, before in ((RTN(int8()), 0), (RTN(int4()), w.size)):
        jobs = quantize_module.plan({"kernel": w}, None, config)
        program = programs_module.run.lower(*split_bits(config), *jobs[0].types(1)).compile()
        tree, _ = quantize_params({"kernel": w}, None, config)
        parts = needed_memory(jobs).parts
        want = w.nbytes + tree["kernel"].nbytes + before + memory.compiled_bytes(program)
        assert parts["matrices at work"] == max(want, 2 * w.nbytes)


def test_work_of_a_method_is_counted(calibrated):
    params, stats = calibrated
    rtn, gptq = (
        needed_memory(quantize_module.plan(params, stats, config)).parts["matrices at work"]
        for config in (RTN(int8()), GPTQ(int8()))
    )
    assert rtn < gptq


@pytest.mark.parametrize("place", [lambda tree: tree, lambda tree: jax.device_put(tree, jax.devices()[1])])
def test_nothing_is_compiled_twice(place):
    params, x = place(attention_params()), place(normal(40 * T, K))
    program = _Program(attention, params, x, None, None)
    program.memory(params, x, None, begun=False)
    total = program.nothing()
    with compilations() as seen:
        program.add(total, params, x, 0, None)
    assert not seen
    stats, config = calibrate(attention, params, [x]), GPTQ(int4(group_size=16))
    jobs = quantize_module.plan(params, stats, config)
    programs_module.run.clear_cache()
    needed_memory(jobs)
    (spans, size), *rest = chunks(jobs)
    given = jax.tree.map(lambda *a: jnp.concatenate(a), *[span.matrices() for span in spans])
    with compilations() as seen:
        programs_module.run(*split_bits(config), *given)
    assert (len(seen), rest, size) == (0, [], 3)


def nothing_may_run(monkeypatch):
    monkeypatch.setattr(_Program, "add", lambda *a: pytest.fail("a batch was run"))
    monkeypatch.setattr(quantize_module, "_solve", lambda *a: pytest.fail("a matrix was solved"))


def test_refuses_what_cannot_fit_before_any_work(calibrated, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda devices: 2**14)
    nothing_may_run(monkeypatch)
    message = (
        r"calibrate will allocate about 0\.\d MiB \(statistics 0\.\d MiB.*, but 0\.0 MiB are available; "
        r"calibrate fewer weights at a time through a `recipe` .* shorter sequences"
    )
    with pytest.raises(ValueError, match=message):
        calibrate(attention, attention_params(), [normal(T, K)])
    with pytest.raises(ValueError, match=r"quantize_params will allocate .* are available; .* fewer weights per call"):
        quantize_params(*calibrated, GPTQ(int4(group_size=16)))


def test_says_how_much_and_refuses_nothing_where_memory_is_not_known(calibrated, monkeypatch, caplog):
    monkeypatch.setattr(memory, "available", lambda devices: None)
    with caplog.at_level(logging.INFO, "jaxquant"):
        calibrate(attention, attention_params(), [normal(T, K)] * 2)
        quantize_params(*calibrated, RTN(int8()))
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("calibrate will allocate about ")
    assert second.startswith("quantize_params will allocate about ")
    assert first.endswith("; free memory is not known")


def test_a_containers_limit_counts_without_the_pages_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    alone = memory.available(jax.devices()[:1])
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("70000\n")
    (tmp_path / "memory.stat").write_text("anon 40000\nactive_file 10000\ninactive_file 20000\n")
    assert memory.available(jax.devices()[:1]) > alone / 2
    (tmp_path / "memory.max").write_text("100000\n")
    assert memory.available(jax.devices()[:1]) == 60000
    assert memory.available(jax.devices()[:2]) == 30000  # two devices of one host


class Accelerator:
    platform, process_index = "gpu", 0

    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_accelerators_tell_themselves():
    one = Accelerator({"bytes_limit": 100, "bytes_in_use": 30})
    assert memory.available([one, Accelerator({"bytes_limit": 100, "bytes_in_use": 60})]) == 40
    assert memory.available([one, Accelerator(None)]) is None
