"""Results that are kept in a file as they come, so that a run that was interrupted goes on where it was."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Kept:
    """A JSON Lines file: a header that names the run, and a line for each result.

    Attributes:
      path: of the file; None where results stay in memory.
      results: those that are there, from earlier runs too.
    """

    def __init__(self, path: Path | None, header: dict[str, Any], kind: type):
        """Reads the file, or begins it; a line that was cut off is dropped from it.

        Args:
          path: of the file, whose directory is made if need be; None for no file.
          header: all that the results depend on, as JSON knows it.
          kind: of every result.

        Raises:
          ValueError: the file belongs to another run.
        """
        self.path, self.results = path, list[Any]()
        if path is None:
            return
        whole = path.read_bytes() if path.exists() else b""
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            os.truncate(path, end)
        if end == 0:
            return self._append([header])
        try:
            first, *self.results = map(json.loads, whole[:end].splitlines())
        except (ValueError, RecursionError):
            first = None
        if first != header or not all(isinstance(result, kind) for result in self.results):
            raise ValueError(
                f"{path} holds no results of this model, with these settings, on these data; delete it, or name "
                "another place"
            )

    def add(self, results: Sequence[Any]) -> None:
        """Adds results, and waits until they are on the disk."""
        self.results += results
        self._append(results)

    def _append(self, values: Sequence[Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b"".join(json.dumps(value).encode() + b"\n" for value in values))
            file.flush()
            os.fsync(file.fileno())
