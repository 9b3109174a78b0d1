"""Checkpoints that are not what was written."""

from safetensors.numpy import load_file, save_file


def damage(directory, module, **arrays):
    """Replaces tensors of one module, by the last part of their names; None removes them."""
    stored = load_file(directory / "model.safetensors")
    for part, array in arrays.items():
        stored.pop(f"{module}.{part}", None)
        if array is not None:
            stored[f"{module}.{part}"] = array
    save_file(stored, directory / "model.safetensors")
