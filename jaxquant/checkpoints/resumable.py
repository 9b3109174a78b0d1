"""Checkpoints that take long to make: written in parts, and continued after a kill.

A run that writes NAME keeps a hidden directory beside it, `.NAME.unfinished`:

    run.json           the fingerprint: what is written, made of what, by what
    checkpoint/        the files of the checkpoint so far, model-00001.safetensors and so on
    00001.json         what is known of a part: the checksums of its files, and a note of whoever wrote it
    state-00001/       what the next part begins with; only of the last part
    part/, part.json   what is being written

A part is done when its JSON file has its name, which it gets when everything else is on the disk; what is there without
one is written again. The disk is waited for in a thread of its own, while the next part is made. When all parts are
done, `checkpoint` gets its final name, and the rest is removed. A lock on the directory, which dies with its process,
keeps a second run away.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from jaxquant.checkpoints.directory import check_new_directory, flush, install, locked, sync
from jaxquant.checkpoints.json_file import read_json, write_json
from jaxquant.checkpoints.tensors import Tensors, write_index, write_tensors

logger = logging.getLogger("jaxquant")

_ANEW = "begin anew with resume=False (--no-resume)"


class Run:
    """A checkpoint that is being written. `resumable_directory` makes one.

    Attributes:
      directory: its files so far. What belongs to no part (a configuration) is written here when all parts are done.
    """

    def __init__(self, home: Path, disk: ThreadPoolExecutor):
        self._home, self.directory, self._disk = home, home / "checkpoint", disk
        self._records: list[dict[str, Any]] = []
        self._last: Future | None = None  # ends when the part that was added last is done

    @property
    def notes(self) -> list[Any]:
        """What the `write` of each part has returned. Errors as `settle`."""
        self.settle()
        return [record["note"] for record in self._records]

    def state(self) -> dict[str, Any]:
        """What was to be kept for the part after the last one, NumPy arrays. Errors as `settle`."""
        self.settle()
        return dict(Tensors(self._home / _state(len(self._records))))

    def add(self, write: Callable[[Path], Any], state: Mapping[str, Any] | None = None) -> None:
        """Writes the next part; it is done when another is added, or `settle` has returned.

        Args:
          write: writes safetensors files, whose names do not matter, into the empty directory that it is given, and
            returns what is to be known of the part, as JSON knows it.
          state: arrays to keep for the next part, as `write_tensors` takes them. They are written later.

        Raises:
          OSError: the disk refuses, this part or the one before it.
        """
        self.settle()
        part = self._home / "part"
        part.mkdir()
        self._last = self._disk.submit(self._finish, part, write(part), state)

    def settle(self) -> None:
        """Waits until the last part is done.

        Raises:
          OSError: the disk refuses.
        """
        if self._last is not None:
            self._last.result()
            self._last = None  # not before: what failed, or was not waited for to the end, must not be forgotten

    def count(self) -> int:
        """How many parts are done, once the last one is or has failed."""
        wait([] if self._last is None else [self._last])
        return len(self._records)

    def _finish(self, part: Path, note: Any, state: Mapping[str, Any] | None) -> None:
        number = len(self._records) + 1
        written = sorted(part.glob("*.safetensors"))
        for file in written:
            sync(file)
        checksums = [_checksum(file) for file in written]
        for file, name in zip(written, _names(number, len(written)), strict=True):
            os.replace(file, self.directory / name)
        sync(self.directory)
        shutil.rmtree(part)
        if state:
            (self._home / _state(number)).mkdir()
            write_tensors(self._home / _state(number), state)
            flush(self._home / _state(number))
        record = {"files": checksums, "note": note}
        _write_whole(self._home / _record(number), record)
        shutil.rmtree(self._home / _state(number - 1), ignore_errors=True)
        self._records.append(record)

    def index(self) -> None:
        """Writes the index of all parts, which makes their files one checkpoint.

        Raises:
          OSError, ValueError: one of them is missing or damaged.
        """
        write_index(self.directory, self.files())

    def files(self) -> list[str]:
        """The names of the files of all parts. Errors as `settle`."""
        self.settle()
        return [name for i, record in enumerate(self._records, 1) for name in _names(i, len(record["files"]))]

    def begin(self, fingerprint: Mapping[str, str], resume: bool) -> None:
        """Finds what is done of a run with this fingerprint, or begins it. Errors as `resumable_directory`."""
        if not resume or not (self._home / "run.json").exists() or not self.directory.is_dir():
            _clear(self._home)
            self.directory.mkdir()
            _write_whole(self._home / "run.json", dict(fingerprint))
            return
        found = read_json(self._home / "run.json")
        other = [what for what in fingerprint if found.get(what) != fingerprint[what]]
        if other:
            raise ValueError(f"{self._home} holds an unfinished run of another {', '.join(other)}; {_ANEW}")
        while (file := self._home / _record(number := len(self._records) + 1)).exists():
            record = read_json(file)
            for name, checksum in zip(_names(number, len(record["files"])), record["files"], strict=True):
                self._check(self.directory / name, checksum)
            self._records.append(record)
        done = range(1, len(self._records) + 1)
        _clear(self._home, {"run.json", "checkpoint", _state(len(done)), *map(_record, done)})
        _clear(self.directory, set(self.files()))
        if self._records:
            logger.info("continuing after %d parts that are done, in %s", len(self._records), self._home)

    def _check(self, file: Path, checksum: str) -> None:
        if not file.is_file() or _checksum(file) != checksum:
            raise ValueError(f"{file} is not what the unfinished run has written; {_ANEW}")


@contextlib.contextmanager
def resumable_directory(
    path: str | os.PathLike, fingerprint: Mapping[str, str], *, overwrite: bool = False, resume: bool = True
) -> Iterator[Run]:
    """Yields a run that becomes the checkpoint `path` when the block ends.

    When the block raises, or the process is killed, what is done is kept for the next run. If no part is done, nothing
    is.

    Args:
      path: the final name, as for `new_directory`.
      fingerprint: everything that the files depend on, by what it is.
      overwrite: replaces an existing checkpoint, all of it, once the new one is complete.
      resume: continues a run that was not finished; without it, what that has done is removed.

    Raises:
      ValueError: the unfinished run has another fingerprint, or one of its files has changed.
      OSError: as `new_directory`, or another run is writing the same checkpoint.
    """
    target = check_new_directory(path, overwrite=overwrite)
    home = target.parent / f".{target.name}.unfinished"
    with contextlib.ExitStack() as stack:
        with locked(target.parent, wait=True):
            stack.enter_context(_held(home, target))
        run = Run(home, stack.enter_context(ThreadPoolExecutor(1)))
        run.begin(fingerprint, resume)
        try:
            yield run
            run.settle()
            flush(run.directory)
        except BaseException:
            if done := run.count():
                logger.info("%d parts are done and kept in %s; run the same again to continue", done, home)
            else:
                shutil.rmtree(home, ignore_errors=True)
            raise
        with locked(target.parent, wait=True):
            old = install(run.directory, target, overwrite)
            shutil.rmtree(home, ignore_errors=True)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _held(home: Path, target: Path) -> Iterator[None]:
    """Makes the directory of a run, and holds its lock."""
    if home.is_symlink() or (home.exists() and not home.is_dir()):
        raise FileExistsError(f"{home} is no directory, but unfinished runs are kept there; remove it")
    home.mkdir(exist_ok=True)
    descriptor = os.open(home, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another run is writing {target}; wait until it has ended, or write elsewhere") from None
        except OSError:  # the file system has no locks
            pass
        yield
    finally:
        os.close(descriptor)


def _record(number: int) -> str:
    return f"{number:05d}.json"


def _state(number: int) -> str:
    return f"state-{number:05d}"


def _names(number: int, count: int) -> list[str]:
    """The names in the checkpoint of the files of a part."""
    return [f"model-{number:05d}{f'-{i}' if i else ''}.safetensors" for i in range(count)]


def _checksum(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _clear(directory: Path, kept: set[str] | None = None) -> None:
    """Removes everything from a directory but the names that are to be kept."""
    for path in directory.iterdir():
        if path.name in (kept or set()):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_whole(file: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file that is there with all that it holds, or not at all."""
    partial = file.parent / "part.json"
    write_json(partial, value)
    sync(partial)
    os.replace(partial, file)
    sync(file.parent)
