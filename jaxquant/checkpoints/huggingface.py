"""Hugging Face directories: where they lie, and what they hold beside tensors."""

import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from jaxquant.checkpoints.json_file import check_link

CONFIG = "config.json"
OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # what older writers put nowhere else
COMPANIONS = (  # what a tokenizer and `generate` read
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


def find_checkpoint(name: str | os.PathLike) -> Path:
    """Returns the local directory of a checkpoint, downloading it where `name` is a hub id ("owner/model").

    Raises:
      FileNotFoundError: `name` is neither a directory nor to be had from the hub or its local cache.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; give the directory of the checkpoint")
    patterns = ["*.safetensors", "*.json", *COMPANIONS]
    try:
        return Path(snapshot_download(os.fspath(name), allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # of whatever library talks to the hub, or of what it makes of a broken answer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{os.fspath(name)!r} is no local directory, and the Hugging Face hub did not deliver it: {reason}"
        ) from error


def copy_companions(source: Path, directory: Path) -> None:
    """Copies the tokenizer and the generation settings of one checkpoint into another, as far as there are any.

    Raises:
      ValueError: one of them is a link to a file elsewhere.
    """
    for name in COMPANIONS:
        if (source / name).is_file():
            check_link(source / name)
            shutil.copyfile(source / name, directory / name)
