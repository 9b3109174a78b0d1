"""Evaluation against float64 NumPy, on a model that can be computed by hand: logits are a row of a table."""

import json
import math
import sys

import jax
import numpy as np
import pytest

from jaxquant.evaluation import hub_data
from jaxquant.evaluation.data import (
    Samples,
    pad_documents,
    read_documents,
    read_tokens,
    read_until,
    take_samples,
)
from jaxquant.evaluation.metrics import compare, perplexity
from jaxquant.evaluation.windows import batches, cut_windows

VOCAB = 11


def bigram(params, tokens):
    return params[tokens]


def running(params, tokens):  # logits depend on the whole context: the windows matter
    return jax.numpy.cumsum(params[tokens], 1)


@pytest.fixture(scope="module")
def setup():
    rng = np.random.default_rng(0)
    table, other = rng.normal(size=(2, VOCAB, VOCAB))
    return table.astype(np.float32), (table + 0.2 * other).astype(np.float32), rng.integers(0, VOCAB, 300)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def window_logs(table, tokens, context, stride, model):
    """(log probabilities, targets) per window, written as transformers' guide to strided perplexity does."""
    previous, result = 0, []
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        part = tokens[begin:end]
        logits = table[part] if model is bigram else np.cumsum(table[part].astype(np.float64), 0)
        wanted = end - max(previous, begin)
        targets = part[1:].copy()
        logs = log_softmax(logits[:-1])
        keep = np.arange(1, len(part)) >= len(part) - wanted
        if keep.any():
            result.append((logs[keep], targets[keep]))
        previous = end
        if end == len(tokens):
            break
    return result


@pytest.mark.parametrize("model", [bigram, running])
@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 4), (16, 16), (50, 7), (300, None), (400, None)])
def test_perplexity_equals_a_loop_over_windows(setup, model, context, stride):
    table, _, tokens = setup
    parts = window_logs(table, tokens, context, stride or context, model)
    losses = np.concatenate([-logs[np.arange(len(t)), t] for logs, t in parts])
    found = perplexity(model, table, tokens, context=context, stride=stride, batch_size=3)
    assert found == pytest.approx(math.exp(losses.mean()), rel=1e-5)


def test_each_token_but_the_first_is_scored_once_when_windows_overlap():
    for n, context, stride in [(100, 16, 5), (100, 16, 15), (17, 16, 3), (16, 16, 8), (5, 16, 16), (33, 32, 1)]:
        windows = cut_windows(np.arange(n), context, stride)
        targets = windows.tokens[:, 1:][windows.scored]
        assert sorted(targets) == list(range(1, n))


def test_independent_streams_are_not_joined():
    windows = cut_windows(np.arange(20).reshape(4, 5), 5)
    assert windows.scored.sum() == 16
    np.testing.assert_array_equal(windows.tokens, np.arange(20).reshape(4, 5))


def test_batches_are_filled_up_with_unscored_windows():
    parts = list(batches(cut_windows(np.arange(100), 10), 4))
    assert [p.tokens.shape for p in parts] == [(4, 10)] * 3
    assert parts[-1].scored.sum(1).tolist() == [9, 9, 0, 0]


def test_comparison_equals_float64(setup):
    base, model, tokens = setup
    found = compare(bigram, model, base, tokens, context=32, batch_size=4)
    old, new = (window_logs(t, tokens, 32, 32, bigram) for t in (base, model))
    per_window = []
    for (p, targets), (q, _) in zip(old, new, strict=True):
        i = np.arange(len(targets))
        kl = (np.exp(p) * (p - q)).sum(-1)
        per_window.append((p[i, targets] - q[i, targets], kl, q.argmax(-1) == p.argmax(-1)))
    count = np.array([len(w[0]) for w in per_window])
    assert found.tokens == count.sum()
    for k, estimate in enumerate((found.loss_increase, found.kl, found.top1_agreement)):
        sums = np.array([w[k].sum() for w in per_window])
        mean = sums.sum() / count.sum()
        n = len(sums)
        stderr = math.sqrt(n / (n - 1) * np.square(sums - mean * count).sum()) / count.sum()
        assert estimate.mean == pytest.approx(mean, rel=1e-4)
        assert estimate.stderr == pytest.approx(stderr, rel=1e-3)
    assert math.log(found.perplexity / found.baseline_perplexity) == pytest.approx(found.loss_increase.mean, rel=1e-4)


def test_a_model_compared_with_itself(setup):
    table, _, tokens = setup
    found = compare(bigram, table, table, tokens, context=32)
    assert found.loss_increase == (0, 0)
    assert found.kl.mean == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == (1, 0)


def test_standard_error_covers_the_truth():
    """Over many independent samples, the estimate is within two standard errors of the true mean about 95% of times."""
    rng = np.random.default_rng(1)
    base, other = rng.normal(size=(2, VOCAB, VOCAB)).astype(np.float32)
    model = base + np.float32(0.3) * other
    p, q = np.exp(log_softmax(base)), log_softmax(model)
    true_kl = (p * (np.log(p) - q)).sum(-1).mean()  # tokens are uniform
    inside = 0
    for _ in range(100):
        found = compare(bigram, model, base, rng.integers(0, VOCAB, 400), context=16, batch_size=25)
        inside += abs(found.kl.mean - true_kl) < 2 * found.kl.stderr
    assert 85 <= inside <= 99


def test_a_second_evaluation_compiles_nothing(setup):
    table, _, tokens = setup
    traces = []

    def counted(params, tokens):
        traces.append(1)
        return params[tokens]

    for _ in range(2):
        perplexity(counted, table, tokens, context=20)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (np.zeros(8), {}, "expected integers"),
        (np.zeros((2, 2, 2), int), {}, "expected integers"),
        (np.zeros(1, int), {}, "at least 2 tokens"),
        (np.zeros(8, int), {"context": 1}, "context >= 2"),
        (np.zeros(8, int), {"context": 4, "stride": 5}, "stride <= context"),
        (np.zeros(8, int), {"context": 4, "stride": 0}, "stride=0"),
    ],
)
def test_bad_tokens_and_windows_are_refused(setup, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(bigram, setup[0], tokens, **options)


def test_predictions_that_are_not_finite_are_refused(setup):
    table = setup[0].copy()
    table[3, 3] = np.nan
    with pytest.raises(ValueError, match="not finite: params holds NaN or infinity, in 'table'"):
        perplexity(lambda params, tokens: bigram(params["table"], tokens), {"table": table}, setup[2])
    with pytest.raises(ValueError, match=r"not finite: .* its parameters are finite"):
        perplexity(lambda params, tokens: bigram(params, tokens) / 0, setup[0], setup[2])


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_without_windows_is_refused(setup, size):
    with pytest.raises(ValueError, match=f"batch_size={size} must be 1 or more"):
        perplexity(bigram, setup[0], setup[2], batch_size=size)


def tokenize(text):
    return [len(word) for word in text.split()]


def test_tokens_are_read_from_every_kind_of_file(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    (tmp_path / "a.txt").write_text("one three fifteen")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a bb"}) + "\n\n" + json.dumps({"text": "ccc"}) + "\n")
    assert read_tokens(tmp_path / "a.npy", tokenize).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_tokens(tmp_path / "a.txt", tokenize).tolist() == [3, 5, 7]
    assert read_tokens(tmp_path / "a.jsonl", tokenize).tolist() == [1, 2, 3]


def npy(shape, descr="<i8"):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"\x93NUMPY", "no readable .npy"),
        ("a.npy", b"", "no readable .npy"),
        ("a.npy", b"PK\x03\x04garbage", "no readable .npy"),
        ("a.npy", npy("((("), "no readable .npy"),
        ("a.npy", npy(f"({10**23},)"), "no readable .npy"),
        ("a.npy", npy(f"({10**15},)"), "no readable .npy"),
        ("a.npy", npy("(0,)", "<m8[s]"), "holds timedelta64"),
        ("a.jsonl", b"[" * 100000, "line 1: no JSON"),
        ("a.jsonl", b'{"text": "abc \\ud800 def"}', "line 1: expected an object with text"),
        ("a.txt", b"\xff\xfe\xfa", "no UTF-8"),
        ("a.txt", b"", "holds no tokens"),
        ("a.jsonl", b"{}\n", "line 1: expected an object with text under 'text'"),
        ("a.jsonl", b'{"text": "a"}\nxx\n', "line 2: no JSON"),
        ("a.csv", b"1", "unknown ending '.csv'"),
    ],
)
def test_unreadable_token_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tokens(tmp_path / name, tokenize)


@pytest.mark.parametrize("array", [np.zeros((3, 2)), np.zeros((1, 2, 3), int), np.array([1, -4]), np.array(["a"])])
def test_arrays_that_are_no_token_ids_are_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a\.npy holds"):
        read_tokens(tmp_path / "a.npy", tokenize)


def test_pickled_arrays_are_not_run(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="no readable"):
        read_tokens(tmp_path / "a.npy", tokenize)


def test_a_missing_token_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npy: no such file"):
        read_tokens(tmp_path / "nothing.npy", tokenize)


def test_documents_are_lines_and_rows(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    np.save(tmp_path / "b.npy", np.arange(4))
    (tmp_path / "a.txt").write_text("one three\nfifteen")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in ("a bb", "", "ccc")))
    found = [read_documents(tmp_path / name, tokenize, field="body") for name in ("a.npy", "b.npy", "a.txt", "a.jsonl")]
    lists = [[document.tolist() for document in documents] for documents in found]
    assert lists == [[[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3]], [[3, 5, 7]], [[1, 2], [], [3]]]


def test_documents_are_padded_or_cut_and_the_seed_chooses():
    documents = [np.arange(n, dtype=np.int32) + 1 for n in (5, 2, 0, 3)]
    samples = pad_documents(documents, 8, 4, seed=0)
    assert samples.tokens.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0], [1, 2, 3, 0]]
    assert samples.real.tolist() == [[True] * 4, [True, True, False, False], [True] * 3 + [False]]
    assert samples.num_tokens == 9
    assert pad_documents(documents[:1], 8, 4, seed=0).real is None  # nothing is padded
    many = [np.full(2, i, np.int32) for i in range(50)]
    first, again, other = (pad_documents(many, 5, 2, seed=seed) for seed in (0, 0, 1))
    assert first.tokens.tolist() == again.tokens.tolist() != other.tokens.tolist()
    assert first.tokens.shape == (5, 2)
    with pytest.raises(ValueError, match="the documents hold no tokens"):
        pad_documents([np.zeros(0, np.int32)], 5, 2, seed=0)
    with pytest.raises(ValueError, match="both must be positive"):
        pad_documents(documents, 0, 4, seed=0)


def test_the_checksum_of_samples_tells_them_apart():
    tokens, real = np.arange(6, dtype=np.int32).reshape(2, 3), np.ones((2, 3), bool)
    kinds = [(tokens, None), (tokens, real), (tokens, ~real), (tokens + 1, None), (tokens.reshape(3, 2), None)]
    assert len({Samples(*kind).sha256 for kind in kinds}) == len(kinds)
    assert Samples(tokens.astype(np.int64), None).sha256 == Samples(tokens, None).sha256
    assert [len(batch.tokens) for batch in Samples(np.zeros((5, 2), np.int32), None).batches(2)] == [2, 2, 1]


def test_names_of_data_sets():
    assert all(map(hub_data.is_name, ("owner/name", "name", "owner/na.me-2:config_1")))
    assert not any(map(hub_data.is_name, ("/etc/passwd", "a/b/c", "a b", "", "../x/y", "a:b:c")))


def test_a_data_set_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=r"owner/name is no file; if it .*pip install 'jaxquant\[datasets\]'"):
        next(hub_data.texts("owner/name", field="text", seed=0))


def test_data_sets_are_read_in_the_order_of_the_seed(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the extra jaxquant[datasets] is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"body": f"text {i}"}) for i in range(40)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    first, again, other = (list(hub_data.texts("owner/name", field="body", seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(f"text {i}" for i in range(40))
    with pytest.raises(ValueError, match="owner/name has no text in 'text'; its columns are body"):
        next(hub_data.texts("owner/name", field="text", seed=0))
    with pytest.raises(FileNotFoundError, match="nowhere/gone is no file, and no data set that the hub delivers"):
        next(hub_data.texts("nowhere/gone", field="text", seed=0))


def test_texts_are_read_until_there_are_enough():
    asked = []

    def texts():
        for text in ("a bb", "ccc", "a a a", "b"):
            asked.append(text)
            yield text

    assert [len(d) for d in read_until(texts(), tokenize, tokens=4)] == [2, 1, 3]
    assert [len(d) for d in read_until(texts(), tokenize, documents=1)] == [2]
    assert len(asked) == 4
    assert len(read_until(texts(), tokenize, tokens=100)) == 4


def test_samples_are_spread_over_the_stream():
    assert take_samples(np.arange(100), 3, 10)[:, 0].tolist() == [0, 40, 90]
    assert take_samples(np.arange(25), 8, 10)[:, 0].tolist() == [0, 10]
    assert take_samples(np.arange(20).reshape(4, 5), 2, 3).tolist() == [[0, 1, 2], [5, 6, 7]]
    with pytest.raises(ValueError, match="9 tokens do not fill one sample of 10"):
        take_samples(np.arange(9), 1, 10)
    with pytest.raises(ValueError, match="must be positive"):
        take_samples(np.arange(9), 0, 10)


def interrupt_after(windows):
    def progress(done, total):
        if done >= windows:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("measure", ["perplexity", "compare"])
def test_an_interrupted_evaluation_goes_on(setup, tmp_path, measure):
    table, other, tokens = setup
    trees = {"perplexity": (other,), "compare": (other, table)}[measure]

    def run(fn, **options):
        return {"perplexity": perplexity, "compare": compare}[measure](
            fn, *trees, tokens, context=20, batch_size=2, **options
        )

    kept = {"kept": tmp_path / "new" / "kept.jsonl", "fingerprint": "m"}
    with pytest.raises(KeyboardInterrupt):
        run(bigram, **kept, progress=interrupt_after(8))
    assert len(kept["kept"].read_text().splitlines()) == 1 + 4
    computed = []

    def counting(params, tokens):
        jax.debug.callback(lambda: computed.append(1))
        return bigram(params, tokens)

    assert run(counting, **kept) == run(bigram)
    jax.effects_barrier()
    assert 0 < len(computed) <= 2 * 4  # batches of the eight; a comparison runs two models


@pytest.mark.parametrize("other", ["fingerprint", "tokens", "context", "batch_size"])
def test_sums_of_another_evaluation_are_not_taken(setup, tmp_path, other):
    table, _, tokens = setup
    how = {"tokens": tokens, "context": 20, "batch_size": 2, "fingerprint": "m", "kept": tmp_path / "kept.jsonl"}
    perplexity(bigram, table, **how)
    before = how["kept"].read_bytes()
    how[other] = {"fingerprint": "n", "tokens": tokens[::-1], "context": 30, "batch_size": 4}[other]
    with pytest.raises(ValueError, match="holds no results of this model, with these settings, on these data"):
        perplexity(bigram, table, **how)
    assert how["kept"].read_bytes() == before
