"""A corpus that every machine already has: the source text of the running interpreter's standard library.

It serves as built-in calibration and evaluation text, so that nothing has to be downloaded and no text is shipped. The
model in `jaxquant/models/tinylm` is trained on its "train" split. A file's split is a hash of its path, so a file that
is held out on one version or distribution of Python is held out on all of them.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_LEFT_OUT = {
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),  # not the standard library's text
    *("test", "tests", "idle_test"),  # left out by some distributions, so measurements would differ
    "encodings",  # a hundred generated tables, near copies of one another on both sides of any split
}
# Files of one build, which hold the paths of the machine that built it.
_OF_ONE_BUILD = ("config-", "_sysconfigdata")
_HELD_OUT_PERCENT = 10


def standard_library_text(split: str) -> list[str]:
    """Returns the texts of the standard library's `.py` files in one split, one string per file, in order of path.

    `split` is "train" or "held_out" (about 10% of the files). Tests, generated tables and files that are not UTF-8 are
    left out. Raises ValueError for another split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split={split!r}: the splits are 'train' and 'held_out'")
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = (_read(root / path) for path in _source_files(root) if _split_of(path) == split)
    return [text for text in texts if text]


def _source_files(root: Path) -> Iterator[PurePosixPath]:
    paths = sorted(PurePosixPath(file.relative_to(root).as_posix()) for file in root.rglob("*.py"))
    return (path for path in paths if not _is_left_out(path))


def _is_left_out(path: PurePosixPath) -> bool:
    return not _LEFT_OUT.isdisjoint(path.parts) or path.parts[0].startswith(_OF_ONE_BUILD)


def _split_of(path: PurePosixPath) -> str:
    number = int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:8], "big")
    return "held_out" if number % 100 < _HELD_OUT_PERCENT else "train"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
