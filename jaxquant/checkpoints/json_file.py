"""JSON files: small, hand-editable and untrusted."""

import json
from pathlib import Path
from typing import Any

BLOBS = ("snapshots", "blobs")  # in the Hugging Face cache, links from a folder in the first lead into the second
LARGEST = 2**26  # bytes; indices of the largest models have less than half of that


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a JSON object, is too large, is nested too deeply, or has a key twice or with line breaks.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    check_link(path)
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size} bytes; no such file of a checkpoint has more than {LARGEST}")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_checked)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, a number of too many digits
        raise ValueError(f"{path} is not valid JSON ({error}); restore or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def check_link(path: Path) -> None:
    """Raises ValueError for a link to a file outside of its directory, and of the Hugging Face cache that it lies in.

    A checkpoint from elsewhere could name any file of its reader, who may pass on what is made of it.
    """
    if not path.is_symlink():
        return
    folder, target = path.parent.resolve(), path.resolve()
    blobs = folder.parent.parent / BLOBS[1] if folder.parent.name == BLOBS[0] else folder
    if not target.is_relative_to(folder) and not target.is_relative_to(blobs):
        raise ValueError(f"{path} is a link out of its directory, to {target}; copy the file there")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


def _checked(pairs):
    result = dict(pairs)
    for key in result:
        if not key.isprintable():  # errors are one line
            raise ValueError(f"the key {key!r} has letters that cannot be printed")
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice in one object")
    return result
