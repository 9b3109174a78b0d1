"""Texts of data sets of the Hugging Face hub, through the package `datasets` (an extra of this package)."""

import re
from collections.abc import Iterator
from typing import Any

BUFFER = 1000  # rows among which the next is chosen


def is_name(name: str) -> bool:
    """Whether this may name a data set: "owner/name" or "name", with ":configuration" where it has several."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name) is not None


def texts(name: str, *, field: str, seed: int) -> Iterator[str]:
    """The texts of a data set's training split in an order that the seed decides, downloaded as they are asked for.

    Args:
      name: as for `is_name`.
      field: the column of the text.
      seed: of the order, in which each row is chosen among the next `BUFFER`.

    Raises:
      FileNotFoundError: the package is not installed, or the hub does not deliver.
      ValueError: there is no text in that column.
    """
    try:
        import datasets
    except ImportError:
        raise FileNotFoundError(
            f"{name} is no file; if it is a data set of the Hugging Face hub, pip install 'jaxquant[datasets]'"
        ) from None
    path, _, configuration = name.partition(":")
    for row in _rows(datasets, name, path, configuration or None, seed):
        text = row.get(field)
        if not isinstance(text, str):
            raise ValueError(f"{name} has no text in '{field}'; its columns are {', '.join(row)}, see --field")
        yield text


def _rows(datasets: Any, name: str, path: str, configuration: str | None, seed: int) -> Iterator[dict[str, Any]]:
    try:
        data = datasets.load_dataset(path, configuration, split="train", streaming=True)
        yield from data.shuffle(seed=seed, buffer_size=BUFFER)
    except Exception as error:  # of whatever library talks to the hub
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{name} is no file, and no data set that the hub delivers: {reason}") from error
