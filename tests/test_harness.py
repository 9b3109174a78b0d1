"""lm-eval's tasks on a checkpoint, against lm-eval's own adapter on the same weights."""

import json

import pytest

from jaxquant.models import TINYLM

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("lm_eval", reason="lm-eval is not installed; it comes with the extra `eval`")

TEXTS = ["import os\nimport sys\n\n\ndef main(argv):\n    return 0\n", "class A:\n    pass\n" * 60]
CHOICES = [("import numpy as", [" np", " pd", " plt"]), ("for i in", [" range", " None", " import os"])]


def task(name, kind, rows, folder, **fields):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    return {"task": name, "output_type": kind, **data, **fields}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    choices = [{"context": c, "options": o, "gold": 0} for c, o in CHOICES]
    written = [{"context": "def f(x):\n    return", "answer": " x"}, {"context": "import", "answer": " os"}]
    until = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    return [
        task("rolling", "loglikelihood_rolling", [{"text": t} for t in TEXTS], folder,
             doc_to_text="", doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}]),
        task("choice", "multiple_choice", choices, folder, doc_to_text="{{context}}", doc_to_choice="{{options}}",
             doc_to_target="{{gold}}", target_delimiter="", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}]),
        task("until", "generate_until", written, folder, doc_to_text="{{context}}", doc_to_target="{{answer}}",
             generation_kwargs=until, metric_list=[{"metric": "exact_match"}]),
    ]  # fmt: skip


def evaluated(model, tasks):
    import lm_eval

    found = lm_eval.simple_evaluate(model=model, tasks=tasks, log_samples=True, bootstrap_iters=0)
    return found["results"], {name: [s["resps"] for s in rows] for name, rows in found["samples"].items()}


@pytest.mark.filterwarnings("ignore")  # of lm-eval, datasets and what they import
def test_scores_are_those_of_the_adapter_for_transformers(tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "data"))
    from lm_eval.models.huggingface import HFLM

    from jaxquant.harness import HarnessLM

    theirs, their_answers = evaluated(HFLM(str(TINYLM), device="cpu", dtype="float32", batch_size=2), tasks)
    ours, our_answers = evaluated(HarnessLM(str(TINYLM), batch_size=2, dtype="float32"), tasks)
    assert ours.keys() == theirs.keys() == {"rolling", "choice", "until"}
    for name in theirs:
        for metric, value in theirs[name].items():
            if isinstance(value, float):
                assert ours[name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
    assert our_answers["until"] == their_answers["until"]
    assert any(text[0][0] for text in our_answers["until"])


@pytest.mark.parametrize(
    ("fields", "message"), [({"batch_size": 0}, "batch_size=0"), ({"max_length": -1}, "max_length")]
)
def test_refuses(fields, message):
    from jaxquant.harness import HarnessLM

    with pytest.raises(ValueError, match=message):
        HarnessLM(str(TINYLM), **fields)
