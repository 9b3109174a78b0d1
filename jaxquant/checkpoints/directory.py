"""Output directories that appear whole or not at all.

A checkpoint is written into a hidden sibling of its final name, flushed to disk and renamed into place. A run that is
killed leaves nothing under the final name, or the old checkpoint; what it leaves beside it (`.NAME.partial-…`) is
removed by the next run that writes the same name. A lock on such a sibling, which dies with its process, tells a killed
run from one that is still writing; the short moments in which siblings are made, renamed and cleared away are guarded
by a lock on the parent. What long runs keep beside it (`.NAME.unfinished`), so that they can go on, is in `resumable`.
"""

import contextlib
import fcntl
import fnmatch
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxquant.checkpoints.huggingface import COMPANIONS, CONFIG, OLD_CONFIGS
from jaxquant.checkpoints.tensors import INDEX

MARKS = (CONFIG, "jaxquant.json")  # a directory with one of these and safetensors or Orbax's arrays is a checkpoint
FOLDER, MANIFEST = "arrays", "manifest.ocdbt"  # of those, and a file in it
PARTS = ("*.safetensors", INDEX, *MARKS, *OLD_CONFIGS, *COMPANIONS)  # all that is ever overwritten


@contextlib.contextmanager
def new_directory(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory that becomes `path` when the block ends, and is removed when it raises.

    Args:
      path: the final name. Its parent must exist; it may itself exist as an empty directory.
      overwrite: replaces an existing checkpoint, all of it, once the new one is complete.

    Raises:
      FileExistsError: `path` is a file or a symbolic link, or is not empty and must not be overwritten: because
        `overwrite` is not given, or because it holds something else than a checkpoint.
      FileNotFoundError: the parent does not exist.
      OSError: the parent cannot be written to.
    """
    target = check_new_directory(path, overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        with locked(target.parent, wait=True):
            partial = _sibling(target, "partial")
            os.mkdir(partial)
            stack.callback(shutil.rmtree, partial, ignore_errors=True)  # gone if it was installed
            stack.enter_context(locked(partial))
        yield partial
        flush(partial)
        with locked(target.parent, wait=True):
            old = install(partial, target, overwrite)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def check_new_directory(path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Returns `path` as an absolute path if `new_directory` could make it now. Arguments and errors as there."""
    target = Path(os.path.abspath(os.path.expanduser(path)))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} does not exist; create it before writing {target.name} into it")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"cannot write into {target.parent}: no permission")
    with locked(target.parent, wait=True):
        _recover(target)
        _check_replaceable(target, overwrite)
        probe = _sibling(target, "partial")  # refused now, not after the work: a name that is too long, a strange place
        os.mkdir(probe)
        os.rmdir(probe)
    return target


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if target.is_symlink():
        raise FileExistsError(f"{target} is a symbolic link; give the directory itself")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; give a directory")
    if _is_vacant(target):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists and is not empty; pass overwrite=True (--overwrite) to replace it")
    foreign = _foreign(target)  # a slip of the pen may name a home directory
    if foreign is not None:
        raise FileExistsError(
            f"{target} {foreign}, and only checkpoints are overwritten; remove it yourself or give another directory"
        )


def _foreign(target: Path) -> str | None:
    """Why a directory that is not empty is no checkpoint, or more than one; None if it is a checkpoint."""
    names = sorted(os.listdir(target))
    holds_tensors = any(name.endswith(".safetensors") for name in names) or (target / FOLDER / MANIFEST).is_file()
    if not any(mark in names for mark in MARKS) or not holds_tensors:
        return f"is not empty and holds no checkpoint (safetensors and {' or '.join(MARKS)})"
    for name in names:
        is_part = any(fnmatch.fnmatchcase(name, part) for part in PARTS) and (target / name).is_file()
        if not is_part and not (name == FOLDER and (target / FOLDER / MANIFEST).is_file()):
            return f"holds {name}, which is no part of a checkpoint that jaxquant writes"
    return None


def _is_vacant(target: Path) -> bool:
    return not target.exists() or not any(target.iterdir())


def install(partial: Path, target: Path, overwrite: bool) -> Path | None:
    """Gives the new directory its name; returns where the old one is, if there was one. Under the parent's lock."""
    _check_replaceable(target, overwrite)  # again: it may have changed while the new one was written
    old = None if _is_vacant(target) else _sibling(target, "replaced")
    if old is not None:
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    sync(target.parent)  # before the old one goes
    return old


def _recover(target: Path) -> None:
    """Clears up after killed runs: one that died between two renames gets its old directory back."""
    for old in _siblings(target, "replaced"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)  # another run may be clearing it away too
        else:
            os.rename(old, target)
    for partial in _siblings(target, "partial"):
        with locked(partial) as dead:
            if dead:
                shutil.rmtree(partial, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{secrets.token_hex(4)}"


def _siblings(target: Path, kind: str) -> list[Path]:
    found = target.parent.glob(f".{glob.escape(target.name)}.{kind}-" + "[0-9a-f]" * 8)
    return [path for path in found if path.is_dir() and not path.is_symlink()]


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds the lock of a directory, which a rename does not end; yields whether it was to be had."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:  # its own run has cleared it away
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:  # another run writes here, or the file system has no locks: then nothing of others is removed
            held = False
        yield held
    finally:
        os.close(descriptor)


def flush(directory: Path) -> None:
    """Waits until a directory and all that it holds are on the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            sync(Path(folder, name))
        sync(Path(folder))


def check_writable(path: str | os.PathLike) -> Path:
    """The path of a file that can be written, made absolute; OSError, before the work, where it cannot."""
    target = Path(os.path.abspath(os.path.expanduser(path)))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} does not exist; create it before writing {target.name} into it")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory; give the name of a file")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"cannot write into {target.parent}: no permission")
    return target


def write_whole(file: Path, text: str) -> None:
    """Writes a text file, which has all of it or is what it was before.

    Raises:
      OSError: it cannot be written.
    """
    made, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".partial", dir=file.parent)
    partial = Path(name)
    try:
        with open(made, "w", encoding="utf-8", newline="\n") as opened:
            opened.write(text)
        partial.chmod(0o666 & ~_umask())  # mkstemp's are for their owner alone
        sync(partial)
        os.replace(partial, file)
        sync(file.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it was renamed
            partial.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Waits until a file, or the list of a directory's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
