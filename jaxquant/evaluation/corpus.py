"""A corpus that every machine already has: the source text of the running interpreter's standard library.

It serves as built-in calibration and evaluation text, so that nothing has to be downloaded and no text is shipped. The
model in `jaxquant/models/tinylm` is trained on its "train" split. A file's split is a hash of its path, so a file that
is held out on one version or distribution of Python is held out on all of them.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_NOT_LIBRARY = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
# Code pages: a hundred generated tables that are near copies of one another, on both sides of any split.
_TABLES = {"encodings"}
# Files of the build that hold the machine's own paths.
_OF_THE_BUILD = ("config-", "_sysconfigdata")
_HELD_OUT_PERCENT = 10


def standard_library_text(split: str) -> list[str]:
    """Returns the texts of the standard library's `.py` files in one split, one string per file, in order of path.

    `split` is "train" or "held_out" (about 10% of the files). The held-out split has no test directories, which some
    distributions leave out; the training split keeps those that are there. Files that are not UTF-8 are skipped.
    Raises ValueError for another split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r}: the splits are 'train' and 'held_out'")
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = (_read(root / path) for path in _source_files(root) if _split_of(path) == split)
    return [text for text in texts if text]


def _source_files(root: Path) -> Iterator[PurePosixPath]:
    paths = sorted(PurePosixPath(file.relative_to(root).as_posix()) for file in root.rglob("*.py"))
    return (path for path in paths if not _is_excluded(path))


def _is_excluded(path: PurePosixPath) -> bool:
    return bool((_NOT_LIBRARY | _TABLES).intersection(path.parts)) or path.parts[0].startswith(_OF_THE_BUILD)


def _split_of(path: PurePosixPath) -> str | None:
    number = int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:8], "big")
    if number % 100 >= _HELD_OUT_PERCENT:
        return "train"
    return None if _TESTS.intersection(path.parts) else "held_out"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
