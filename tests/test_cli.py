"""The command line, as a user types it, on a small random model and on the packaged one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import jaxquant as jq
from jaxquant import cli, demo, workflows
from jaxquant.models import TINYLM
from jaxquant.models.names import tensors_from_params
from jaxquant.numerics.statistics import HELD_OUT_EVERY, token_hash

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random float checkpoint with token files beside it, and no tokenizer."""
    folder = tmp_path_factory.mktemp("cli")
    model = jq.Model.from_hf(HF_CONFIG)
    jq.save(folder / "model", model, model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    np.save(folder / "tokens.npy", rng.integers(0, 96, (40, 32)))
    np.save(folder / "held.npy", rng.integers(0, 96, 700))
    return folder


def run(capsys, *argv):
    status = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    return status, out.out, out.err


def quantize_arguments(checkpoint, out, *more):
    files = ["--calibration", checkpoint / "tokens.npy", "--num-samples", 32, "--seq-len", 32]
    return ["quantize", checkpoint / "model", "--out", out, "--group-size", 32, *files, *more]


@pytest.mark.parametrize(
    ("format", "scale_bytes", "others"),  # what is stored beside codes and scales: shapes; zero points and groups
    [("jaxquant", 4, 0), ("compressed-tensors", 4, 2 * 16), ("gptq", 2, 2 * (2 * 128 * 3 // 8 + 64 * 4))],
)
def test_quantize_evaluate_inspect(checkpoint, tmp_path, capsys, format, scale_bytes, others):
    out = tmp_path / "q"
    status, text, _ = run(capsys, *quantize_arguments(checkpoint, out, "--format", format, "--bits", 3, "--json"))
    report = json.loads(text)
    assert status == 0
    assert report["bytes_after"] < report["bytes_before"]
    assert len(report["layers"]) == 2 * 7
    assert all(layer["method"] == "GPTQ" and layer["bits"] == 3 for layer in report["layers"])

    data = ["--data", checkpoint / "held.npy", "--context", 64, "--json"]
    status, text, _ = run(capsys, "evaluate", out, "--baseline", checkpoint / "model", *data)
    result = json.loads(text)
    model, params = jq.load_pretrained(out, dtype="float32")
    expected = jq.perplexity(model.apply, params, np.load(checkpoint / "held.npy"), context=64)
    assert status == 0
    assert result["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert result["comparison"]["kl"]["mean"] > 0

    status, text, _ = run(capsys, "inspect", out, "--json")
    leaves = {leaf["path"]: leaf for leaf in json.loads(text)["leaves"]}
    assert status == 0
    assert leaves["layers/mlp/up_proj/kernel"]["stored_as"] == "3 bits, groups of 32, symmetric"
    size = 2 * 64 * 128 * 3 // 8 + 2 * 2 * 128 * scale_bytes  # 3 bits a code and one scale a group of 32
    assert leaves["layers/mlp/up_proj/kernel"]["nbytes"] == size
    assert leaves["layers/mlp/up_proj/kernel"]["stored_nbytes"] == size + others
    assert leaves["embed_tokens/embedding"]["stored_as"] == "float32"


def test_output_for_people(checkpoint, tmp_path, capsys):
    status, text, _ = run(capsys, *quantize_arguments(checkpoint, tmp_path / "q", "--method", "rtn"))
    assert status == 0
    assert "written:" in text
    assert "RTN" in text
    status, text, _ = run(capsys, "evaluate", tmp_path / "q", "--data", checkpoint / "held.npy")
    assert text.startswith("perplexity ")
    status, text, _ = run(capsys, "inspect", tmp_path / "q")
    assert "bytes in memory" in text
    assert "      kernel" in text
    assert "█" in text


def test_flags_reach_the_method(checkpoint, tmp_path, capsys):
    arguments = ["quantize", checkpoint / "model", "--out", tmp_path / "q", "--per-channel", "--asymmetric"]
    files = ["--calibration", checkpoint / "tokens.npy", "--no-act-order", "--bits", 5, "--json"]
    _, text, _ = run(capsys, *arguments, *files)
    layer = json.loads(text)["layers"][0]
    assert (layer["bits"], layer["group_size"], layer["symmetric"]) == (5, None, False)
    _, params = jq.load_pretrained(tmp_path / "q")
    plain = params["layers"]["mlp"]["down_proj"]["kernel"].codes
    run(capsys, *[*arguments[:3], tmp_path / "r", *arguments[4:]], *files[:2], *files[3:])  # with act-order
    _, params = jq.load_pretrained(tmp_path / "r")
    assert (plain != params["layers"]["mlp"]["down_proj"]["kernel"].codes).any()


NARROW = jq.int8(narrow_range=True, scale_dtype="float32")
G128, STATIC = jq.int4(group_size=128), jq.int8(activations=jq.ActivationSpec(static=True))


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ("", jq.GPTQ(jq.int4(group_size=128))),
        ("--format gptq", jq.GPTQ(jq.int4(group_size=128, scale_dtype="float16"))),
        ("--clip diagonal --refine 2", jq.GPTQ(jq.int4(group_size=128), clip="diagonal", refine=2)),
        ("--method rtn --clip mse --bits 3", jq.RTN(jq.int3(group_size=128), clip="mse")),
        ("--method awq --asymmetric", jq.AWQ(jq.int4(group_size=128, symmetric=False))),
        ("--method awq+gptq --clip mse", jq.Chain(jq.AWQ(G128, clip="mse"), jq.GPTQ(G128, clip="mse"))),
        ("--method smoothquant --alpha 0.3", jq.SmoothQuant(0.3, jq.int8(activations=jq.ActivationSpec()))),
        ("--method llm-int8 --threshold 5", jq.LLMInt8(5.0)),
        ("--method llm-int8 --format bitsandbytes", jq.LLMInt8(spec=NARROW, outliers=0)),
        (
            "--method smoothquant+gptq --bits 8 --per-channel --activations static",
            jq.Chain(jq.SmoothQuant(None, STATIC), jq.GPTQ(STATIC)),
        ),
    ],
)
def test_arguments_describe_a_method(monkeypatch, capsys, arguments, config):
    asked = []

    def quantize(model, out, config, **options):
        asked.append(config)
        return jq.Report((), (), {}, 0, 0)

    monkeypatch.setattr("jaxquant.workflows.quantize_checkpoint", quantize)
    assert run(capsys, "quantize", "tinylm", "--out", "x", *arguments.split())[0] == 0
    assert asked == [config]


@pytest.mark.parametrize(
    ("method", "format", "used"),
    [
        ("awq", "compressed-tensors", {"AWQ", "RTN"}),  # o_proj has heads in common
        ("awq", "awq", {"AWQ", "RTN"}),
        ("llm-int8", "bitsandbytes", {"LLMInt8"}),
    ],
)
def test_methods_reach_other_formats(checkpoint, tmp_path, capsys, method, format, used):
    arguments = quantize_arguments(checkpoint, tmp_path / "q", "--method", method, "--format", format)
    if method == "llm-int8":
        arguments[arguments.index("--group-size")] = "--per-channel"
        arguments.remove(32)
    status, text, error = run(capsys, *arguments, "--json")
    assert status == 0, error
    assert {layer["method"] for layer in json.loads(text)["layers"]} == used
    data = ["--data", checkpoint / "held.npy", "--context", 64, "--json"]
    _, text, _ = run(capsys, "evaluate", tmp_path / "q", "--baseline", checkpoint / "model", *data)
    assert json.loads(text)["comparison"]["kl"]["mean"] < 0.1


def bad_inputs(checkpoint, tmp_path):
    tokens = checkpoint / "tokens.npy"
    np.save(tmp_path / "outside.npy", np.full((4, 32), 96))
    np.save(tmp_path / "none.npy", np.zeros(0, int))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    model, out = checkpoint / "model", tmp_path / "out"
    good = ["quantize", model, "--out", out, "--calibration", tokens]
    return {
        "no such model": (["quantize", tmp_path / "nowhere", "--out", out], "no local directory"),
        "group size": ([*good, "--group-size", 48], "group_size=48 does not divide"),
        "bits": ([*good, "--bits", 9], "bits=9 is not supported"),
        "outside vocabulary": ([*good[:5], tmp_path / "outside.npy"], "token 96 at position [0, 0] is outside"),
        "empty calibration": ([*good[:5], tmp_path / "none.npy"], "holds no tokens"),
        "missing calibration": ([*good[:5], tmp_path / "no.npy"], "no such file"),
        "no tokenizer": (["quantize", model, "--out", out], "no tokenizer"),
        "no such setting": (
            [*good, "--method", "rtn", "--no-act-order"],
            "--no-act-order is read by --method gptq only",
        ),
        "alpha": ([*good, "--method", "smoothquant", "--alpha", 2], "alpha=2.0 must be from 0 to 1"),
        "alpha without its method": ([*good, "--alpha", 0.5], "--alpha is read by --method smoothquant only"),
        "threshold": (
            [*good, "--method", "llm-int8", "--threshold", -1],
            "threshold=-1.0 of outliers must be positive",
        ),
        "outliers elsewhere": (
            [*good, "--method", "llm-int8", "--format", "compressed-tensors"],
            "outliers in floating point have no place in the format",
        ),
        "no samples": ([*good, "--num-samples", 0], "must be positive"),
        "output not empty": ([*good[:2], "--out", tmp_path / "full", *good[4:]], "not empty"),
        "no parent": ([*good[:2], "--out", tmp_path / "a" / "b", *good[4:]], "does not exist"),
        "evaluate nothing": (["evaluate", tmp_path / "nowhere"], "no local directory"),
        "context": (["evaluate", model, "--data", tokens, "--context", 1], "context >= 2"),
        "inspect a file": (["inspect", tokens], "is a file"),
        "inspect nothing": (["inspect", tmp_path / "full"], "config.json is missing"),
    }


def test_bad_input_is_one_clear_line_and_nothing_is_lost(checkpoint, tmp_path, capsys):
    for name, (argv, message) in bad_inputs(checkpoint, tmp_path).items():
        status, text, error = run(capsys, *argv)
        last = error.strip().splitlines()[-1]
        assert status == 1, name
        assert last.startswith("jaxquant: error:"), name
        assert message in last, (name, last)
        assert text == "", name
        assert not (tmp_path / "out").exists(), name
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_bad_output_is_refused_before_any_work(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    monkeypatch.setattr("jaxquant.workflows.open_pretrained", lambda *a, **k: pytest.fail("work was begun"))
    status, _, error = run(capsys, *quantize_arguments(checkpoint, tmp_path / "full"))
    assert status == 1
    assert "not empty" in error
    narrow = jq.GPTQ(jq.QuantSpec(bits=4, group_size=64, narrow_range=True))
    with pytest.raises(ValueError, match="narrow_range has no place"):
        workflows.quantize_checkpoint(
            str(checkpoint / "model"), str(tmp_path / "q"), narrow, format="compressed-tensors"
        )


def test_names_that_cannot_be_written_are_refused_before_any_work(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxquant.workflows.open_pretrained", lambda *a, **k: pytest.fail("work was begun"))
    status, _, error = run(capsys, *quantize_arguments(checkpoint, tmp_path / ("n" * 240)))
    assert (status, "too long" in error) == (1, True)
    assert not list(tmp_path.iterdir())


def test_a_terminal_without_all_letters_gets_the_others(checkpoint, tmp_path):
    arguments = map(str, quantize_arguments(checkpoint, tmp_path / "q", "--method", "rtn"))
    command = [sys.executable, "-m", "jaxquant", *arguments]
    result = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (result.returncode, b"written:" in result.stdout) == (0, True), result.stderr


def test_rounding_is_measured_where_calibration_is_given(checkpoint, tmp_path, capsys):
    arguments = quantize_arguments(checkpoint, tmp_path / "q", "--method", "rtn", "--json")
    layers = json.loads(run(capsys, *arguments)[1])["layers"]
    assert all(0 < layer["error"] == layer["rtn_error"] for layer in layers)


def test_overwrite_replaces(checkpoint, tmp_path, capsys):
    for bits, more, expected in [(8, [], 0), (4, [], 1), (4, ["--overwrite"], 0)]:
        arguments = quantize_arguments(checkpoint, tmp_path / "q", "--method", "rtn", "--bits", bits, *more)
        status, _, _ = run(capsys, *arguments)
        assert status == expected
    _, params = jq.load_pretrained(tmp_path / "q")
    assert params["layers"]["mlp"]["up_proj"]["kernel"].spec.bits == 4


def test_a_quantized_checkpoint_is_not_quantized_again(checkpoint, tmp_path, capsys):
    assert run(capsys, *quantize_arguments(checkpoint, tmp_path / "q", "--method", "rtn"))[0] == 0
    arguments = ["quantize", tmp_path / "q", "--out", tmp_path / "r", "--calibration", checkpoint / "tokens.npy"]
    status, _, error = run(capsys, *arguments)
    assert status == 1
    assert "quantized already" in error


def test_memory_is_told_before_work_and_refused(checkpoint, tmp_path, capsys, monkeypatch):
    status, text, error = run(capsys, *quantize_arguments(checkpoint, tmp_path / "q", "--json"))
    told = [line for line in error.splitlines() if "will allocate about" in line]
    assert status == 0
    assert [line.partition(" will")[0] for line in told] == ["quantizing layer by layer"]
    assert json.loads(text)["out"] == str(tmp_path / "q")
    monkeypatch.setattr("jaxquant.transforms.memory.available", lambda devices: 2**10)
    status, text, error = run(capsys, *quantize_arguments(checkpoint, tmp_path / "r", "--json"))
    assert (status, text) == (1, "")
    assert error.strip().splitlines()[-1].startswith("jaxquant: error: quantizing layer by layer will allocate about")
    assert not (tmp_path / "r").exists()


def test_nan_weights_are_named(checkpoint, tmp_path, capsys):
    model, params = jq.load_pretrained(checkpoint / "model")
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    params["layers"]["mlp"]["up_proj"]["kernel"] = kernel.at[1, 2, 3].set(np.nan)
    jq.save(tmp_path / "nan", model, params)
    arguments = ["quantize", tmp_path / "nan", "--out", tmp_path / "q", "--method", "rtn", "--group-size", 32]
    status, _, error = run(capsys, *arguments)
    assert status == 1
    assert "nan: layers/mlp/up_proj/kernel: 1 of its 16384 entries are not finite" in error
    (tmp_path / "hf").mkdir()
    save_file(tensors_from_params(model.config, params), tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(HF_CONFIG))
    status, _, error = run(capsys, "quantize", tmp_path / "hf", *arguments[2:])
    assert status == 1
    assert "model.layers.1.mlp.up_proj.weight: 1 of its 8192 entries are not finite" in error


def test_usage_errors(capsys):
    quantize = ["quantize", "m", "--out", "o"]
    meshes = [[*quantize, "--mesh", shape] for shape in ("2", "0x1", "ax1", "1x9")]  # there are eight devices
    for argv in ([], ["quantize"], ["quantize", "m"], [*quantize, "--method", "x"], ["nothing"], *meshes):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert stopped.value.code == 2
        assert "usage:" in capsys.readouterr().err


def test_an_interrupted_command_says_so_in_a_line(checkpoint, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxquant.transforms.stream.Stream.quantize", interrupt)
    status, text, error = run(capsys, *quantize_arguments(checkpoint, tmp_path / "q"))
    assert (status, text) == (130, "")
    assert error.strip().splitlines()[-1] == "jaxquant: interrupted"
    assert not (tmp_path / "q").exists()


def test_module_runs():
    result = subprocess.run([sys.executable, "-m", "jaxquant", "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "quantize", "evaluate", "inspect"):
        assert command in result.stdout


def rows_made_apart(saved):
    """Perplexity and loss increase of RTN, by the public functions alone, without calibration."""
    model, params = jq.load_pretrained("tinylm", dtype="float32")
    tokens = workflows.TextSource("tinylm").corpus("held_out", 4 * 256)
    before = jq.perplexity(model.apply, params, tokens, context=256)
    assert before == pytest.approx(saved["float_perplexity"], rel=1e-4)
    rows = {}
    for bits in (4, 2):
        quantized, _ = jq.quantize_params(params, None, model.recipe(jq.RTN(jq.QuantSpec(bits=bits, group_size=128))))
        after = jq.perplexity(model.apply, quantized, tokens, context=256)
        rows[bits] = after, math.log(after / before)
    return rows


def test_demo(tmp_path, capsys, monkeypatch):
    """The demo itself, on less text; every number in its table is compared with one made apart from it."""
    monkeypatch.setattr(demo, "CALIBRATION", (16, 128))
    monkeypatch.setattr(demo, "EVALUATION", (4, 256))
    monkeypatch.setattr(demo, "WIDTHS", (4, 2))
    status, text, _ = run(capsys, "demo", "--out", tmp_path / "demo", "--json")
    assert status == 0
    saved = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert saved == json.loads(text)
    assert [(row["method"], row["bits"]) for row in saved["rows"]] == [
        *((method, bits) for bits in (4, 2) for method in ("RTN", "AWQ", "GPTQ")),
        *(("SmoothQuant", 8), ("LLM.int8()", 8)),
    ]
    again = rows_made_apart(saved)
    for row in saved["rows"]:
        if row["activation_bits"] == 16:  # a scale for 128 weights, and AWQ's channel scales
            more = 0.06 if row["method"] == "AWQ" else 1e-6
            assert row["bits_per_weight"] == pytest.approx(row["bits"] + 16 / 128, abs=more)
        else:
            assert row["loss_increase"] < 0.02
            assert 8 < row["bits_per_weight"] < 10.5
        if row["method"] == "RTN":
            assert again[row["bits"]] == pytest.approx((row["perplexity"], row["loss_increase"]), rel=1e-3, abs=1e-5)
    rtn, awq, gptq = saved["rows"][3:6]
    assert max(gptq["loss_increase"], awq["loss_increase"]) < rtn["loss_increase"]
    for name in ("size.png", "perplexity.png"):
        with Image.open(tmp_path / "demo" / name) as image:
            assert image.size[0] > 600
            assert len(image.convert("L").getcolors()) > 20  # something is drawn


def test_packaged_model_is_small():
    assert sum(file.stat().st_size for file in Path(TINYLM).iterdir()) <= 10_000_000


def test_padding_and_the_data_are_in_the_report(checkpoint, tmp_path, capsys):
    arguments = quantize_arguments(checkpoint, tmp_path / "q", "--pad", "--seq-len", 48, "--seed", 3, "--json")
    report = json.loads(run(capsys, *arguments)[1])
    data, layers = report["calibration"], report["layers"]
    assert data["source"] == str(checkpoint / "tokens.npy")
    assert (data["sequences"], data["length"], data["tokens"]) == (32, 48, 32 * 32)
    assert (data["pad"], data["seed"], len(data["sha256"])) == (True, 3, 64)
    positions = np.arange(32 * 48).reshape(32, 48)[:, :32]
    held = np.asarray(token_hash(jnp.asarray(positions.ravel(), jnp.uint32))) % HELD_OUT_EVERY == 0
    assert {layer["tokens"] for layer in layers} == {32 * 32 - held.sum()}
    rounded = quantize_arguments(checkpoint, tmp_path / "r", "--method", "rtn", "--json")
    assert json.loads(run(capsys, *rounded[:6], *rounded[-3:])[1])["calibration"] is None
