"""The main job, end to end, on the packaged model: quantize, export, and evaluate in transformers."""

import json
import math
import warnings

import numpy as np
import pytest

from jaxquant import cli, workflows
from jaxquant.models import TINYLM

CONTEXT = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token files made with the packaged tokenizer."""
    folder = tmp_path_factory.mktemp("main")
    text = workflows.TextSource("tinylm")
    np.save(folder / "tokens.npy", text.corpus("train", 64 * CONTEXT).reshape(64, CONTEXT))
    np.save(folder / "held.npy", text.corpus("held_out", 24 * CONTEXT))
    return folder


def loss_in_transformers(directory, tokens):
    """Mean negative log-likelihood of the same windows, computed by torch."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and compressed-tensors' own deprecations
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        windows = torch.tensor(tokens.reshape(-1, CONTEXT).astype(np.int64))
        losses = []
        with torch.no_grad():
            for batch in windows.split(8):
                logs = model(batch).logits[:, :-1].float().log_softmax(-1)
                losses.append(-logs.gather(-1, batch[:, 1:, None]).double())
        return torch.cat(losses).mean().item()


def run(capsys, *argv):
    assert cli.main([str(a) for a in argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_gptq_checkpoint_has_the_same_perplexity_in_transformers_and_beats_rtn(folder, capsys):
    increase = {}
    for method in ("rtn", "gptq"):
        out = folder / method
        files = ["--calibration", folder / "tokens.npy", "--format", "compressed-tensors", "--out", out, "--json"]
        run(capsys, "quantize", "tinylm", "--method", method, "--bits", 3, "--group-size", 128, *files)
        data = ["--data", folder / "held.npy", "--context", CONTEXT, "--json"]
        found = run(capsys, "evaluate", out, "--baseline", "tinylm", *data)
        theirs = loss_in_transformers(out, np.load(folder / "held.npy"))
        assert math.log(found["perplexity"]) == pytest.approx(theirs, rel=1e-5)
        increase[method] = found["comparison"]["loss_increase"]["mean"]
    assert 0 < increase["gptq"] < increase["rtn"] * 0.6  # benchmarks/README.md has the exact ratio, on more text


def test_the_float_model_is_the_same_in_transformers(folder, capsys):
    found = run(capsys, "evaluate", "tinylm", "--data", folder / "held.npy", "--context", CONTEXT, "--json")
    theirs = loss_in_transformers(TINYLM, np.load(folder / "held.npy"))
    assert math.log(found["perplexity"]) == pytest.approx(theirs, rel=1e-5)
    assert theirs < 3.0  # it has learned something: a uniform guess over the vocabulary is 8.3
