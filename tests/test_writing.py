"""Text that checkpoints write, from the command line: continuations, scores, interruptions."""

import json

import numpy as np
import pytest

import jaxquant as jq
from jaxquant import writing
from jaxquant.cli import main
from jaxquant.models.generation import generate
from jaxquant.workflows import TextSource

PROMPT = "def add(a, b):\n    return"


def run(capsys, *argv):
    assert main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def expected(prompt, count):
    tokenizer = TextSource("tinylm").tokenizer
    model, params = jq.load_pretrained("tinylm")
    stop = tokenizer.eos_token_id
    tokens = generate(model, params, [tokenizer(prompt)["input_ids"]], max_new_tokens=count, stop_tokens=[stop])
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_generate_continues_a_prompt(capsys):
    text = expected(PROMPT, 12)
    assert len(text) > 12
    assert run(capsys, "generate", "tinylm", PROMPT, "--greedy", "--max-new-tokens", 12) == text + "\n"
    found = json.loads(run(capsys, "generate", "tinylm", PROMPT, "--greedy", "--max-new-tokens", 12, "--json"))
    assert found == {"prompt": PROMPT, "text": text}


def test_generate_draws(capsys):
    def drawn(*options):
        return run(capsys, "generate", "tinylm", PROMPT, "--max-new-tokens", 12, "--temperature", 1.5, *options)

    assert drawn("--seed", 1) == drawn("--seed", 1) != drawn("--seed", 2)
    assert drawn("--top-k", 1) == expected(PROMPT, 12) + "\n"


def test_letters_of_several_bytes_are_shown_whole():
    pieces, letters = [], {1: "a", 2: "\ufffd", 3: "é"}
    shown = writing._Shown(lambda tokens: "".join(letters[t] for t in tokens).replace("\ufffdé", "é"), pieces.append)
    for token in (1, 2, 3, 2, -1):
        shown(np.array([token]))
    shown.finish()
    assert pieces == ["a", "é", "\ufffd"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "tinylm", ""], "prompt 0 is empty"),
        (["generate", "tinylm", "x" * 3000], "more than the model's context of 512"),
        (["generate", "tinylm", "x", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["generate", "tinylm", "x", "--cache-bits", "9"], "bits=9"),
        (["evaluate", "tinylm", "--metric", "f1"], "--metric f1 needs --data"),
        (["evaluate", "tinylm", "--metric", "f1", "--data", "missing.jsonl"], "missing.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("jaxquant: error: ")
    assert message in error


EXAMPLES = [{"prompt": f"import {name}\n", "properties": {"contains": "import"}} for name in ("os", "re", "sys", "ast")]
EXAMPLES[2]["properties"] = {"contains": "no model writes this"}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(map(json.dumps, EXAMPLES)))
    return path


def test_scores_beside_a_baseline(capsys, data, tmp_path):
    argv = ["evaluate", "tinylm", "--metric", "instruction", "--data", data, "--baseline", "tinylm"]
    argv += ["--max-new-tokens", 8, "--keep", tmp_path / "kept"]
    found = json.loads(run(capsys, *argv, "--json"))
    right = np.mean(["import" in expected(e["prompt"], 8) for e in EXAMPLES[:2] + EXAMPLES[3:]]) * 3 / 4
    assert found["score"]["score"] == found["baseline"]["score"] == pytest.approx(right)
    assert found["difference"] == {"score": 0, "low": 0, "high": 0}
    assert found["examples"] == 4
    assert found["regressions"] == []
    assert "score" in run(capsys, *argv)


def test_an_interrupted_run_goes_on(data, tmp_path, monkeypatch):
    keep, seen, write = tmp_path / "kept", [], writing.Writer.write

    def interrupted(self, prompts, on_text=None):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(prompts)
        return write(self, prompts, on_text)

    def score():
        return writing.evaluate_task("tinylm", str(data), "instruction", max_new_tokens=4, batch_size=1, keep=keep)

    monkeypatch.setattr(writing.Writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score()
    del seen[:]
    found = score()
    assert seen == [[e["prompt"]] for e in EXAMPLES[2:]]
    monkeypatch.setattr(writing.Writer, "write", write)
    again = writing.evaluate_task(
        "tinylm", str(data), "instruction", max_new_tokens=4, batch_size=4, keep=tmp_path / "other"
    )
    assert found == again
