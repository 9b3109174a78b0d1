"""The README's Python, from top to bottom, as a reader would run it, on the packaged model."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_python_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, *others = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (method,) = [block for block in others if "class Refit" in block]
    (training,) = [block for block in others if "fake_quantized" in block]
    names = {"batches": [np.arange(64)[None]], "tokens": np.arange(200), "prompt_ids": [5, 6, 7]}
    exec(first, names)
    exec(method, names)
    assert all(row.error < 0.99 * row.rtn_error for row in names["report"].layers)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam asks for it
        steps = {"optax": optax, "loss": lambda y, x: jnp.mean(y**2), "batches": [names["x"]] * 2}
        exec(training, names | steps)
    for block in (block for block in others if block not in (method, training)):
        exec(block.replace("path/to/llama", "tinylm"), names)
    assert (tmp_path / "llama-w4").is_dir()
