"""Scores of written answers: metrics against their definitions, the bootstrap, files and interruptions."""

import json

import numpy as np
import pytest

from jaxquant.evaluation.task_metrics import METRICS
from jaxquant.evaluation.tasks import Example, metric_named, predictions, read_examples, score


def measured(name, prediction, wanted):
    return METRICS[name].total(METRICS[name].measure(prediction, wanted)[None])


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "wanted"),
    [
        ("exact_match", "The  cat.", "cat", 1),
        ("exact_match", "the cats", "cat", 0),
        ("accuracy", " Positive.\nBecause it is", "positive", 1),
        ("accuracy", "not positive", "positive", 0),
        ("f1", "the black cat sat", "a cat sat down", 2 * 2 / 6),  # black cat sat | cat sat down
        ("f1", "cat cat", "cat", 2 / 3),
        ("f1", "the", "an", 1),
        ("f1", "", "cat", 0),
    ],
)
def test_metrics_of_words(name, prediction, reference, wanted):
    assert measured(name, prediction, reference) == pytest.approx(wanted)


def test_rouge_is_the_longest_common_subsequence():
    pytest.importorskip("rouge_score", reason="rouge-score is not installed; it comes with the extra `eval`")
    found = measured("rouge", "police killed the gunman", "police kill the gunman now")  # "killed" has the stem "kill"
    assert found == pytest.approx(2 * 4 / (4 + 5))


def test_bleu_of_a_set_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed; it comes with the extra `eval`")
    made = ["the cat is on the mat today", "there is a dog", "one more line of text here"]
    references = ["the cat sat on the mat today", "there is a dog here", "one line of text here"]
    counts = np.stack([METRICS["bleu"].measure(m, r) for m, r in zip(made, references, strict=True)])
    assert METRICS["bleu"].total(counts) == pytest.approx(sacrebleu.corpus_bleu(made, [references]).score)
    assert METRICS["bleu"].total(counts) != pytest.approx(np.mean([METRICS["bleu"].total(c[None]) for c in counts]))


@pytest.mark.parametrize(
    ("properties", "wanted"),
    [
        ({"contains": "two", "excludes": "four"}, 1),
        ({"contains": "four", "max_words": 3}, 1 / 2),
        ({"starts_with": "one", "ends_with": "three", "min_words": 4, "matches": r"\btwo\b"}, 3 / 4),
        ({"json": True}, 0),
        ({"json": False}, 1),
    ],
)
def test_instruction_is_the_share_of_properties_that_hold(properties, wanted):
    assert measured("instruction", " one two three\n", properties) == pytest.approx(wanted)


def test_intervals_are_those_of_a_paired_bootstrap():
    rng = np.random.default_rng(3)
    right = rng.random(400) < 0.7
    examples = [Example(f"q{i}", "yes") for i in range(400)]
    made = ["yes" if r else "no" for r in right]
    worse = right.copy()
    worse[np.flatnonzero(right)[:8]] = False
    result = score("accuracy", examples, ["yes" if r else "no" for r in worse], made)
    mean, spread = worse.mean(), np.sqrt(worse.mean() * (1 - worse.mean()) / 400)
    assert result.score.score == pytest.approx(mean)
    assert result.score.low == pytest.approx(mean - 1.96 * spread, abs=0.008)
    assert result.score.high == pytest.approx(mean + 1.96 * spread, abs=0.008)
    paired = np.sqrt(8 / 400 * (1 - 8 / 400) / 400)  # far narrower than the difference of two independent scores
    assert result.difference.score == pytest.approx(-0.02)
    assert result.difference.low == pytest.approx(-0.02 - 1.96 * paired, abs=0.004)
    assert result.difference.high < 0
    assert [r.example for r in result.regressions] == (np.flatnonzero(right)[:8] + 1).tolist()
    assert result.regressions[0] == (int(np.flatnonzero(right)[0]) + 1, *_first(examples, right), "no", "yes")
    assert score("accuracy", examples, made, None)[3:] == (None, None, ())


def _first(examples, right):
    return (examples[np.flatnonzero(right)[0]].prompt,)


def written(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_reads_examples(tmp_path):
    path = written(tmp_path / "a.jsonl", '{"prompt": "a\u2028b", "reference": "c", "more": 1}', "", "")
    assert read_examples(path, metric_named("f1")) == [Example("a\u2028b", "c")]
    path = written(tmp_path / "b.jsonl", '{"prompt": "p", "properties": {"contains": "x"}}')
    assert read_examples(path, metric_named("instruction")) == [Example("p", {"contains": "x"})]


@pytest.mark.parametrize(
    ("metric", "line", "message"),
    [
        ("f1", "{", "line 2: no JSON"),
        ("f1", "[1]", "line 2: expected an object with 'prompt' and 'reference'"),
        ("f1", '{"prompt": "a"}', "line 2: expected an object with 'prompt' and 'reference'"),
        ("f1", '{"prompt": "", "reference": "b"}', "line 2: prompt='' must be text that is not empty"),
        ("f1", '{"prompt": "a", "reference": 1}', "line 2: reference=1 must be text"),
        ("instruction", '{"prompt": "a", "reference": "b"}', "line 2: expected an object with 'prompt' and 'proper"),
        ("instruction", '{"prompt": "a", "properties": {}}', "line 2: properties {} are no object"),
        (
            "instruction",
            '{"prompt": "a", "properties": {"is": 1}}',
            "line 2: property 'is' is unknown; known",
        ),
        (
            "instruction",
            '{"prompt": "a", "properties": {"max_words": "1"}}',
            "line 2: property 'max_words' has",
        ),
        ("instruction", '{"prompt": "a", "properties": {"matches": "("}}', "line 2: property 'matches' has '\\('"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, metric, line, message):
    good = {"prompt": "p", "reference": "r", "properties": {"contains": "x"}}
    path = written(tmp_path / "a.jsonl", json.dumps(good), line)
    with pytest.raises(ValueError, match=message):
        read_examples(path, metric_named(metric))


def test_other_bad_input(tmp_path):
    with pytest.raises(ValueError, match="metric='meteor' is unknown; choose one of accuracy, exact_match, f1"):
        metric_named("meteor")
    with pytest.raises(ValueError, match="holds no examples"):
        read_examples(written(tmp_path / "a.jsonl", ""), metric_named("f1"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_examples(tmp_path / "b.jsonl", metric_named("f1"))
    with pytest.raises(ValueError, match="batch_size=0"):
        predictions(list, [], batch_size=0)


EXAMPLES = [Example(f"prompt {i}", "") for i in range(7)]


def interrupted_after(batches):
    """Writes answers, and is interrupted in a later batch."""
    left = [batches]

    def write(prompts):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return [p.upper() + "\nß" for p in prompts]

    return write


@pytest.mark.parametrize("torn", [b"", b'"half a li', b'"\xc3'])
def test_an_interrupted_run_goes_on(tmp_path, torn):
    kept = tmp_path / "kept.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predictions(interrupted_after(2), EXAMPLES, batch_size=2, kept=kept, fingerprint="m")
    with kept.open("ab") as file:
        file.write(torn)
    asked = []

    def write(prompts):
        asked.extend(prompts)
        return [p.upper() + "\nß" for p in prompts]

    made = predictions(write, EXAMPLES, batch_size=2, kept=kept, fingerprint="m")
    assert made == [p.upper() + "\nß" for p, _ in EXAMPLES]
    assert asked == [p for p, _ in EXAMPLES[4:]]
    assert predictions(interrupted_after(0), EXAMPLES, kept=kept, fingerprint="m") == made


def test_an_interruption_before_the_first_line_loses_nothing(tmp_path):
    kept = tmp_path / "kept.jsonl"
    kept.write_bytes(b'{"fingerpr')
    assert len(predictions(interrupted_after(9), EXAMPLES, kept=kept)) == 7
    assert len(predictions(interrupted_after(0), EXAMPLES, kept=kept)) == 7


@pytest.mark.parametrize("other", ["fingerprint", "prompts", "no file of ours"])
def test_predictions_of_another_run_are_not_taken(tmp_path, other):
    kept = tmp_path / "kept.jsonl"
    predictions(interrupted_after(9), EXAMPLES, kept=kept, fingerprint="m")
    if other == "no file of ours":
        kept.write_bytes(b"important\n")
    before = kept.read_bytes()
    examples = EXAMPLES[1:] if other == "prompts" else EXAMPLES
    with pytest.raises(ValueError, match="holds no results of this model, with these settings, on these data"):
        predictions(list, examples, kept=kept, fingerprint="other" if other == "fingerprint" else "m")
    assert kept.read_bytes() == before
