"""The README's Python, from top to bottom, as a reader would run it, on the packaged model."""

import re
from pathlib import Path

import numpy as np

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_python_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, *others = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (method,) = [block for block in others if "class Refit" in block]
    names = {"batches": [np.arange(64)[None]], "tokens": np.arange(200), "prompt_ids": [5, 6, 7]}
    for block in (first, method, *(block for block in others if block != method)):
        exec(block.replace("path/to/llama", "tinylm"), names)
        if block == method:
            assert all(row.error < 0.99 * row.rtn_error for row in names["report"].layers)
    assert (tmp_path / "llama-w4").is_dir()
