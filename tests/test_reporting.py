"""The report: its numbers against the library's and plain NumPy, and the page as a browser takes it apart."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import random_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import jaxquant as jq
from jaxquant.cli import main
from jaxquant.models.stacking import unstack_layers
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.reporting import page
from jaxquant.reporting.collect import collect
from jaxquant.reporting.figures import Axis, perplexity_plot
from jaxquant.reporting.ranges import OUTLIER

HOSTILE = "\"'><script>alert(1)</script>"
EVIL_NAME = "<img src=x onerror=alert(1)>"
CONTEXT = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model with a hostile tokenizer, two that were made from it, and tokens."""
    folder = tmp_path_factory.mktemp("report")
    model, params = random_model()
    params["layers"]["mlp"]["down_proj"]["kernel"] *= 8  # or nothing that is done to the layers matters to the logits
    jq.save(folder / "float", model, params)
    words = {f"{HOSTILE}{i}\u202e" if i % 3 else f"word{i}\n": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0\n"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "float")
    np.save(folder / "held.npy", np.random.default_rng(0).integers(0, 64, 520))
    rules = model.recipe(jq.RTN(jq.QuantSpec(bits=4, group_size=32)))
    jq.save(folder / EVIL_NAME, model, jq.quantize_params(params, None, rules)[0], format="compressed-tensors")
    two = model.recipe(jq.RTN(jq.QuantSpec(bits=2, group_size=32, symmetric=False)))
    jq.save(folder / "two", model, jq.quantize_params(params, None, two)[0])
    return folder


@pytest.fixture(scope="module")
def found(folder):
    names = [str(folder / EVIL_NAME), str(folder / "two")]
    with jax.numpy_dtype_promotion("strict"):
        return collect(names, baseline=str(folder / "float"), data=str(folder / "held.npy"), context=CONTEXT)


@pytest.fixture(scope="module")
def loaded(folder):
    return {name: jq.load_pretrained(folder / name) for name in ("float", EVIL_NAME, "two")}


class Page(html.parser.HTMLParser):
    """A page's tags, attributes, texts by tag, and the cells of its tables by the section that they are in."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.ids, self._open = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else None, data))

    def of(self, tag):
        return [data.strip() for own, data in self.texts if own == tag and data.strip()]

    @property
    def text(self):
        return "".join(data for tag, data in self.texts if tag not in ("style", "title"))


@pytest.fixture(scope="module")
def rendered(found):
    return page.render(found)


@pytest.fixture(scope="module")
def parsed(rendered):
    return Page(rendered)


def test_numbers_are_those_of_the_library(folder, found, loaded, parsed):
    tokens = np.load(folder / "held.npy")
    model, params = loaded["float"]
    cells = parsed.of("td") + parsed.of("small")
    for row, name in zip(found.rows, (EVIL_NAME, "two"), strict=True):
        own_model, own = loaded[name]
        expected = jq.compare(own_model.apply, own, params, tokens, baseline_fn=model.apply, context=CONTEXT)
        assert row.comparison == expected
        assert expected.kl.mean > 0.001
        weights = [q for q in jax.tree.leaves(own, is_leaf=is_qtensor) if is_qtensor(q)]
        bits = 8 * sum(q.nbytes for q in weights) / sum(q.size for q in weights)
        assert row.storage.bits_per_weight == pytest.approx(bits)
        assert row.nbytes == sum(a.nbytes for a in jax.tree.leaves(own))
        shown = [f"{bits:.3f}", f"{row.nbytes / 1e6:.2f}", f"{expected.perplexity:.4f}", f"{expected.kl.mean:.5f}",
                 f"{expected.loss_increase.mean:+.5f}", f"± {expected.loss_increase.stderr:.5f}",
                 f"{expected.top1_agreement.mean:.2%}"]  # fmt: skip
        assert set(shown) <= set(cells)
        assert found.baseline.perplexity == expected.baseline_perplexity
    assert f"{found.baseline.perplexity:.4f}" in cells
    assert found.baseline.storage == ("float32", 32, ())
    assert not found.notes


def test_errors_are_those_of_outputs_for_the_baselines_inputs(folder, found, loaded, parsed):
    """Against float64, with the inputs that calibration of the same windows holds out."""
    model, params = loaded["float"]
    samples = np.load(folder / "held.npy")[: 16 * CONTEXT].reshape(16, CONTEXT)[[0, 2, 4, 6, 8, 10, 12, 15]]
    stats = jq.calibrate(model.apply, params, [samples])
    two = loaded["two"][1]
    for path in ("self_attn/q_proj", "mlp/down_proj"):
        module, name = path.split("/")
        wide = (np.asarray(a, np.float64) for a in (
            params["layers"][module][name]["kernel"],
            jq.dequantize(two["layers"][module][name]["kernel"]),
            stats.products[f"layers/{path}/kernel"].inputs.held_out))  # fmt: skip
        for layer, (w, rounded, x) in enumerate(zip(*wide, strict=True)):
            expected = np.square(x @ (rounded - w)).sum() / np.square(x @ w).sum()
            error = found.rows[1].errors[path][layer]
            assert error == pytest.approx(expected, rel=1e-4)
            assert page._percent(error) in parsed.of("td")
    assert len(found.rows[1].errors) == 7


def test_ranges_are_those_of_calibration(folder, found, loaded):
    model, params = loaded["float"]
    samples = np.load(folder / "held.npy")[: 16 * CONTEXT].reshape(16, CONTEXT)[[0, 2, 4, 6, 8, 10, 12, 15]]
    inputs = jq.calibrate(model.apply, params, [samples]).products["layers/mlp/down_proj/kernel"].inputs
    assert set(found.ranges) == {
        "self_attn/q_proj, self_attn/k_proj, self_attn/v_proj", "self_attn/o_proj", "mlp/gate_proj, mlp/up_proj",
        "mlp/down_proj"}  # fmt: skip
    for layer, r in enumerate(found.ranges["mlp/down_proj"]):
        absmax = np.asarray(inputs.absmax[layer], np.float64)
        assert r.quantiles[2] == pytest.approx(np.median(absmax))
        large = np.flatnonzero(absmax > OUTLIER * np.median(absmax))
        assert {o.channel for o in r.outliers} == set(large)
        for o in r.outliers:
            assert (o.lowest, o.highest) == (
                float(inputs.lowest[layer, o.channel]),
                float(inputs.highest[layer, o.channel]),
            )


def test_texts_and_divergence(folder, found, loaded):
    model, params = loaded["float"]
    prompts = np.load(folder / "held.npy")[: 32 * 16].reshape(32, 16)[[0, 15, 31]].tolist()
    base = jq.generate(model, params, prompts, max_new_tokens=16)
    own = jq.generate(*loaded["two"], prompts, max_new_tokens=16)
    for a, b, c in zip(base, own, found.rows[1].continuations, strict=True):
        same = next((i for i, pair in enumerate(zip(a, b, strict=True)) if len(set(pair)) > 1), 16)
        assert (len(c.pieces), c.same) == (16, same)
    assert any(c.diverges for c in found.rows[1].continuations)

    ids = np.load(folder / "held.npy")[: 16 * CONTEXT].reshape(16, CONTEXT)[7]
    new, old = (
        np.asarray(m.apply(p, jnp.asarray(ids[None])), np.float64)[0] for m, p in (loaded["two"], loaded["float"])
    )
    new, old = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (new, old))
    kl = (np.exp(old) * (old - new)).sum(-1)[:-1]
    first, *rest = found.rows[1].passage
    assert first.kl is None
    np.testing.assert_allclose([t.kl for t in rest], kl, rtol=1e-3, atol=1e-6)
    assert f"{old[0].argmax()}" in rest[0].baseline_top


def test_nothing_hostile_is_more_than_text(parsed, rendered):
    assert {"script", "img", "iframe", "object", "link", "base", "form"}.isdisjoint(parsed.tags)
    assert not [a for a in parsed.attributes if a[1].startswith("on")]
    assert HOSTILE in parsed.text
    assert EVIL_NAME in parsed.text
    assert "\u202e" not in rendered
    assert "\\u202e" in rendered


def test_nothing_is_fetched(parsed, rendered):
    assert not [a for a in parsed.attributes if a[1] in ("src", "href", "xlink:href", "srcset", "action", "data")]
    assert not re.search(r"url\(|@import|https?://", rendered)
    policy = dict((b, c) for a, b, c in parsed.attributes if a == "meta")["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_an_incomplete_checkpoint_shows_what_there_is(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder / EVIL_NAME, broken)
    tensors = load_file(broken / "model.safetensors")
    left = {name: array for name, array in tensors.items() if ".layers.1." not in name}
    save_file(left, broken / "model.safetensors", metadata={"format": "pt"})
    found = collect([str(broken)], baseline=str(folder / "float"), data=str(folder / "held.npy"), context=CONTEXT)
    (row,) = found.rows
    assert (row.perplexity, row.storage.missing) == (None, (1,))
    assert {tuple(by_layer) for by_layer in row.errors.values()} == {(0,)}
    assert row.storage.bits_per_weight == 4 + 32 / 32
    assert "model.layers.1." in found.notes[0]
    assert "lacks the linear layers of layers 1;" in found.notes[1]
    shown = Page(page.render(found))
    assert all("\n" not in note and note in shown.text for note in found.notes)
    assert "Error by layer" in shown.text
    assert found.baseline.perplexity > 1


def test_an_incomplete_baseline_still_has_weights_to_compare_with(folder, loaded, tmp_path):
    model, params = loaded["float"]
    layers = unstack_layers(params)["layers"]
    jq.save(tmp_path / "whole", dataclasses.replace(model, stacked=False), {**params, "layers": layers})
    jq.save(tmp_path / "base", None, {**params, "layers": {"1": layers["1"]}})
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "base")
    found = collect(
        [str(folder / "two")], baseline=str(tmp_path / "base"), data=str(folder / "held.npy"), context=CONTEXT
    )
    assert found.baseline.storage.missing == (0,)
    assert not found.output_errors
    w = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"], np.float64)[1]
    rounded = np.asarray(jq.dequantize(loaded["two"][1]["layers"]["mlp"]["up_proj"]["kernel"]), np.float64)[1]
    expected = np.square(rounded - w).sum() / np.square(w).sum()
    assert found.rows[0].errors["mlp/up_proj"] == {1: pytest.approx(expected, rel=1e-4)}
    text = Page(page.render(found)).text
    assert "Squared error of the weights" in text
    assert "base lacks the linear layers of layers 0" in text


def test_without_a_baseline(folder):
    found = collect([str(folder / "two")], data=str(folder / "held.npy"), context=CONTEXT)
    model, params = jq.load_pretrained(folder / "two")
    tokens = np.load(folder / "held.npy")
    assert found.rows[0].perplexity == pytest.approx(jq.perplexity(model.apply, params, tokens, context=CONTEXT))
    assert [note.partition(":")[0] for note in found.notes] == [
        "No --baseline was given", f"{folder / 'two'} is quantized"]  # fmt: skip
    text = Page(page.render(found)).text
    assert "No --baseline was given" in text
    assert "Error by layer" not in text
    assert "Ranges" not in text


def test_a_checkpoint_that_does_not_fit_is_not_compared(folder, tmp_path):
    jq.save(tmp_path / "other", *random_model(vocab_size=32, intermediate_size=64))
    found = collect(
        [str(tmp_path / "other")], baseline=str(folder / "float"), data=str(folder / "held.npy"), context=CONTEXT
    )
    assert "its vocabulary of 32 is not that of" in found.notes[0]
    assert found.rows[0].comparison is None
    assert set(found.rows[0].errors) == {f"self_attn/{name}_proj" for name in "qkvo"}  # the others have other shapes


def test_a_baseline_that_is_not_finite_is_named(folder, loaded, tmp_path):
    model, params = loaded["float"]
    jq.save(tmp_path / "nan", model, {**params, "norm": {"scale": params["norm"]["scale"].at[3].set(np.nan)}})
    found = collect(
        [str(folder / "two")], baseline=str(tmp_path / "nan"), data=str(folder / "held.npy"), context=CONTEXT
    )
    assert [note.partition(": ")[0].partition(" ")[2] for note in found.notes] == [
        "was not compared",
        "has no perplexity",
    ]
    assert all("'norm/scale'" in note for note in found.notes)
    assert found.rows[0].errors
    assert "was not compared" in Page(page.render(found)).text


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "r.html"
    argv = [
        "report",
        str(folder / "two"),
        "--data",
        str(folder / "held.npy"),
        "--context",
        str(CONTEXT),
        "--out",
        str(out),
    ]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoints"][0]["perplexity"] > 1
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    for where, message in ((tmp_path, "is a directory"), (tmp_path / "no" / "r.html", "does not exist")):
        assert main([*argv[:-1], str(where)]) == 1
        assert message in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none"), "--out", str(out)]) == 1


def test_a_failed_write_leaves_the_old_page(found, tmp_path, monkeypatch):
    out = tmp_path / "r.html"
    out.write_text("old")
    monkeypatch.setattr(page, "render", lambda findings: "half" + 1)
    with pytest.raises(TypeError):
        page.write(found, out)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("low", "high"), [(3.0, 3.1), (14, 900), (1e-4, 1e7), (0.02, 0.05)])
@pytest.mark.parametrize("log", [True, False])
def test_axes_have_a_few_ticks_where_they_belong(low, high, log):
    axis = Axis(low, high, 10.0, 110.0, log)
    assert (axis.at(low), axis.at(high)) == (10, 110)
    assert 2 < len(axis.ticks) <= 8
    for at, label in axis.ticks:
        assert 10 <= at <= 110
        assert at == pytest.approx(axis.at(float(label)), abs=1)


def test_points_that_lie_together_share_a_label(found):
    first, second = found.rows
    times = {"base": 9, "1": 1, "2": 3, "3": 1.0001}
    rows = [found.baseline, first, second, dataclasses.replace(first, key="3")]
    plot = perplexity_plot([dataclasses.replace(row, perplexity=times[row.key] * first.perplexity) for row in rows])
    assert [text for _, _, text in plot.labels] == ["base", "1, 3", "2"]
    assert len(plot.points) == 4
    assert perplexity_plot([dataclasses.replace(first, perplexity=np.inf)]) is None


def test_a_browser_shows_it_without_complaint(found, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium to look at the page with")
    page.write(found, tmp_path / "r.html")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "r.html").as_uri()]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Token by token" in ran.stdout
    assert "CONSOLE" not in ran.stderr
