"""How well a text answers: one number per prediction, or counts of which a whole set has one number.

`bleu` is sacrebleu's (Post 2018, arXiv:1804.08771), `rouge` the longest common subsequence F-measure of rouge-score
(Lin 2004), both from the extra `eval`. `exact_match` and `f1` are those of SQuAD (Rajpurkar et al. 2016,
arXiv:1606.05250): of words without case, punctuation and articles. `instruction` is the share of an example's
properties that hold, in the manner of IFEval (Zhou et al. 2023, arXiv:2311.07911).
"""

import collections
import importlib
import json
import re
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Metric(NamedTuple):
    """A metric of predictions.

    Attributes:
      measure: `measure(prediction, wanted) -> counts`: float `[n]` of one example. `wanted` is the reference, a text,
        or for `instruction` its properties.
      total: `total(counts [examples, n]) -> score`, of any set of examples.
      wants: the field of an example that `wanted` is.
    """

    measure: Callable[[str, Any], np.ndarray]
    total: Callable[[np.ndarray], float]
    wants: str = "reference"


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(prediction: str, reference: str) -> np.ndarray:
    """1 if both have the same `words`, else 0."""
    return np.array([float(words(prediction) == words(reference))])


def accuracy(prediction: str, reference: str) -> np.ndarray:
    """1 if the `words` of the prediction begin with those of the reference, a label; what comes after is ignored."""
    label = words(reference)
    return np.array([float(words(prediction)[: len(label)] == label)])


def f1(prediction: str, reference: str) -> np.ndarray:
    """The harmonic mean of precision and recall of the reference's `words`; 1 if both have none."""
    found, wanted = words(prediction), words(reference)
    if not found or not wanted:
        return np.array([float(found == wanted)])
    common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return np.array([2 * common / (len(found) + len(wanted))])


def rouge(prediction: str, reference: str) -> np.ndarray:
    """ROUGE-L's F-measure, with stemming."""
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    return np.array([scorer.score(reference, prediction)["rougeL"].fmeasure])


def bleu_counts(prediction: str, reference: str) -> np.ndarray:
    """Matching n-grams and all of them, for n from 1 to 4, and the lengths of both texts, as sacrebleu counts them."""
    score = _library("sacrebleu").sentence_bleu(prediction, [reference], smooth_method="none")
    return np.array([*score.counts, *score.totals, score.sys_len, score.ref_len], np.float64)


def bleu(counts: np.ndarray) -> float:
    """Corpus BLEU, 0 to 100, of `bleu_counts` `[examples, 10]`."""
    sums = counts.sum(0).astype(int).tolist()
    made = _library("sacrebleu").BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp")
    return float(made.score)


def instruction(prediction: str, properties: Mapping[str, Any]) -> np.ndarray:
    """The share of the properties that hold."""
    return np.array([np.mean([_PROPERTIES[name](prediction, value) for name, value in properties.items()])])


def check_properties(properties: Any) -> None:
    """Raises ValueError, naming the fault, unless they are properties that `instruction` can check."""
    if not isinstance(properties, Mapping) or not properties:
        raise ValueError(f'properties {properties!r} are no object like {{"contains": "text"}}')
    for name, value in properties.items():
        if name not in _PROPERTIES:
            raise ValueError(f"property {name!r} is unknown; known: {', '.join(_PROPERTIES)}")
        kind = int if name.endswith("_words") else bool if name == "json" else str
        if type(value) is not kind:
            raise ValueError(f"property {name!r} has the value {value!r}; expected {kind.__name__}")
        if name == "matches":
            try:
                re.compile(str(value))
            except re.error as error:
                raise ValueError(f"property 'matches' has {value!r}, which is no regular expression: {error}") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


_PROPERTIES: dict[str, Callable[[str, Any], bool]] = {
    "contains": lambda text, part: part in text,
    "excludes": lambda text, part: part not in text,
    "starts_with": lambda text, part: text.lstrip().startswith(part),
    "ends_with": lambda text, part: text.rstrip().endswith(part),
    "matches": lambda text, pattern: re.search(pattern, text) is not None,
    "min_words": lambda text, count: len(text.split()) >= count,
    "max_words": lambda text, count: len(text.split()) <= count,
    "json": lambda text, wanted: _is_json(text) == wanted,
}


def _mean(counts: np.ndarray) -> float:
    return float(counts.mean())


METRICS = {
    "accuracy": Metric(accuracy, _mean),
    "exact_match": Metric(exact_match, _mean),
    "f1": Metric(f1, _mean),
    "rouge": Metric(rouge, _mean),
    "bleu": Metric(bleu_counts, bleu),
    "instruction": Metric(instruction, _mean, wants="properties"),
}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"this metric needs {error.name}; install it with: pip install 'jaxquant[eval]'") from None
