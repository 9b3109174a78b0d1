"""The standard library as a corpus."""

import sysconfig

import pytest

from jaxquant.evaluation.corpus import standard_library_text


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A directory that stands for the standard library."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def write(root, path, content: bytes):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content)


def test_splits_are_disjoint_and_deterministic():
    train, held_out = standard_library_text("train"), standard_library_text("held_out")
    assert not set(train) & set(held_out)
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.15
    assert standard_library_text("held_out") == held_out


def test_the_split_of_a_file_hangs_on_its_path_alone(library):
    paths = [f"package/module{i}.py" for i in range(200)]
    for path in paths:
        write(library, path, path.encode())
    before = standard_library_text("held_out")
    for path in paths[::2]:
        write(library, path, b"changed")
    write(library, "other.py", b"more")
    after = standard_library_text("held_out")
    assert 0 < len(before) < 100
    assert [text for text in after if text in paths] == [text for text in before if text in paths[1::2]]
    assert before == sorted(before)


@pytest.mark.parametrize(
    "path",
    [
        *("site-packages/jax/__init__.py", "dist-packages/a.py", "lib-dynload/a.py", "json/__pycache__/a.py"),
        *("test/test_json.py", "unittest/test/a.py", "lib2to3/tests/a.py", "idlelib/idle_test/a.py"),
        *("encodings/cp037.py", "config-3.11-x86_64-linux-gnu/python-config.py", "_sysconfigdata__linux_.py", "a.txt"),
    ],
)
def test_what_is_not_the_library_is_left_out(library, path):
    write(library, path, b"pass")
    assert standard_library_text("train") + standard_library_text("held_out") == []


def test_files_that_are_not_utf8_or_empty_are_skipped(library):
    write(library, "latin.py", "# -*- coding: latin-1 -*-\n# é".encode("latin-1"))
    write(library, "empty.py", b"")
    write(library, "utf.py", "# é".encode())
    assert standard_library_text("train") + standard_library_text("held_out") == ["# é"]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='test': the splits are 'train' and 'held_out'"):
        standard_library_text("test")
