"""JSON files: small, hand-editable and untrusted."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a JSON object, is nested too deeply, or names a key twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, a number of too many digits
        raise ValueError(f"{path} is not valid JSON ({error}); restore or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


def _without_duplicates(pairs):
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice in one object")
    return result
