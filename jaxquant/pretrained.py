"""Models and parameter trees from and to disk."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.checkpoints.directory import check_new_directory, new_directory
from jaxquant.checkpoints.formats import FOREIGN
from jaxquant.checkpoints.huggingface import CONFIG, copy_companions
from jaxquant.checkpoints.json_file import write_json
from jaxquant.checkpoints.modules import MODEL_DTYPES
from jaxquant.checkpoints.native import write_tree
from jaxquant.checkpoints.orbax import Placement, write_orbax
from jaxquant.kernels.prepare import prepare
from jaxquant.loading import quantized_params
from jaxquant.models.model import Model
from jaxquant.models.names import modules, tensors_from_params
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import QuantSpec
from jaxquant.opening import SOURCE, check_parameters, holds_orbax, open_pretrained, read_any_tree
from jaxquant.transforms.fold import fold

Format = Literal["jaxquant", "compressed-tensors", "gptq", "awq", "bitsandbytes", "orbax"]
WRITERS = {"jaxquant": write_tree, "orbax": write_orbax}  # of any tree


def load_pretrained(
    name: str | os.PathLike,
    dtype: DTypeLike | None = None,
    *,
    stacked: bool | None = None,
    sharding: Placement | None = None,
    adapter: str | os.PathLike | None = None,
    quantize: Any = None,
) -> tuple[Model, Any]:
    """Loads a model and its parameters.

    Args:
      name: a local directory, a hub id ("owner/model"), or "tinylm", the model in the package. Read are float
        checkpoints in safetensors, what `save` writes in any format, and quantized weights from elsewhere: GPTQ, AWQ
        (gemm), compressed-tensors' `pack-quantized` and `int-quantized`, bitsandbytes' LLM.int8().
      dtype: of the computation alone, to which the model casts parameters where it uses them; None takes that of the
        largest parameter. To train them in it, cast them: `jax.tree.map(lambda a: a.astype(dtype), params)`.
      stacked: whether the layers are stacked, so that a scan runs over them ("layers/mlp/up_proj/kernel" is
        `[layers, in, out]`), or each has parameters of its own ("layers/0/mlp/up_proj/kernel") and may be quantized in
        its own way. None stacks them unless they are quantized differently.
      sharding: `sharding(path, array)` gives the `jax.sharding.Sharding` of each array by its path in the tree, which
        for a part of a quantized weight ends in its name ("layers/mlp/up_proj/kernel/scale"), and its shape and dtype.
        With format "orbax", the tree is the one that was saved, and each device reads its own shards; others are read
        as a whole first. None leaves everything on the first device.
      adapter: a directory or hub id of a LoRA adapter in PEFT's files, which is added to a float model's weights.
      quantize: a recipe, as for `quantize_params`, by which a float model is quantized while it is read: the floats of
        all layers are never in memory at once. Only for methods that need no statistics, such as `RTN`. A bare config
        takes the linear layers, as `Model.recipe` has it.

    Returns:
      `(model, params)`: `model.apply(params, tokens)` gives logits `[batch, time, vocab]`. Parameters have the dtype
      that they are stored in, whatever `dtype` is, so that they can be saved as they were; quantized ones are QTensors.

    Raises:
      FileNotFoundError: there is no such checkpoint, or one of its files is missing.
      ValueError: a file is damaged, the architecture or the quantization is not supported, `dtype` is none to compute
        in, layers that are quantized differently are to be stacked, or the adapter is not plain LoRA, not the model's,
        or to be added to quantized weights, or `quantize` needs statistics, takes nothing, or the model is quantized.

    Example:
      >>> import jaxquant as jq
      >>> model, params = jq.load_pretrained("tinylm")
      >>> params["layers"]["mlp"]["up_proj"]["kernel"].shape  # [layers, in, out]
      (4, 256, 768)
    """
    checkpoint = open_pretrained(name, sharding, adapter)
    uneven = checkpoint.uneven
    if stacked is None:
        stacked = uneven is None
    if stacked and uneven is not None:
        raise ValueError(f"{checkpoint.directory}: {uneven}; load it with stacked=False")
    _check_compute_dtype(dtype)
    if quantize is not None and checkpoint.is_quantized:
        raise ValueError(f"{checkpoint.directory} is quantized already; leave out quantize={quantize!r}")
    params = checkpoint.params(stacked) if quantize is None else quantized_params(checkpoint, quantize, stacked)
    if sharding is not None and not holds_orbax(checkpoint.directory):
        params = _placed(params, sharding)
    largest = max(jax.tree.leaves(params, is_leaf=is_qtensor), key=lambda leaf: leaf.size)
    model = checkpoint.with_dtype(largest.dtype if dtype is None else dtype).model
    return dataclasses.replace(model, stacked=stacked), params


def save(
    path: str | os.PathLike, model: Model | None, params: Any, *, format: Format = "jaxquant", overwrite: bool = False
) -> None:
    """Writes parameters, and the model's configuration and tokenizer, into a new directory.

    The tokenizer and the generation settings are copied from the directory that the model was loaded from.

    Args:
      path: the directory; it appears whole or not at all, after what was written has been read back.
      model: the model from `load_pretrained`. None writes a bare tree of any shape, for `load`.
      params: its parameters, quantized or not. Without a model: nested dicts, lists and tuples of arrays and QTensors.
      format: "jaxquant" keeps everything bit for bit. Others are read by vLLM and transformers, and have no place for
        channel scales, which are folded into norms and linear layers: "compressed-tensors"; "gptq" and "awq" for
        weights with float16 scales (`scale_dtype="float16"`); "bitsandbytes" for LLM.int8() without float weights
        (`LLMInt8(spec=int8(narrow_range=True), outliers=0)`). "orbax" keeps everything, and each device writes its own
        shards.
      overwrite: replaces an existing checkpoint.

    Raises:
      FileExistsError: the directory exists, and is not empty or no checkpoint; see `new_directory`.
      ValueError: the format is unknown or cannot express the parameters, or these are not the model's.
      TypeError: the tree holds something that is no array, or the model is not one of jaxquant's.
    """
    _check_format(format)
    if model is None and format in FOREIGN:
        raise ValueError(f"format={format!r} needs a model; a bare tree is saved with format='jaxquant'")
    if not isinstance(model, Model | None):
        raise TypeError(
            f"model is a {type(model).__name__}; give a model from load_pretrained, or None for a bare tree"
        )
    params = prepare(params, None)  # files are the same for all platforms
    with new_directory(path, overwrite=overwrite) as directory:
        if model is None:
            WRITERS[format](directory, params)
        else:
            _write_model(directory, model, params, format)


def check_save(
    path: str | os.PathLike, spec: QuantSpec, *, format: Format = "jaxquant", overwrite: bool = False
) -> None:
    """Checks, before hours of work, that `save` could write codes of `spec`. Arguments and errors as there."""
    _check_format(format)
    if format in FOREIGN:
        FOREIGN[format].check_spec(spec)
    check_new_directory(path, overwrite=overwrite)


def load(path: str | os.PathLike, *, sharding: Placement | None = None) -> Any:
    """Reads the parameter tree of a directory that `save` wrote with format "jaxquant" or "orbax".

    `sharding` is as in `load_pretrained`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    directory = Path(os.path.expanduser(path))
    tree = read_any_tree(directory, sharding)
    return tree if sharding is None or holds_orbax(directory) else _placed(tree, sharding)


def _placed(params: Any, sharding: Placement) -> Any:
    def place(path, array):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.device_put(array, sharding(name, jax.ShapeDtypeStruct(array.shape, array.dtype)))

    return jax.tree_util.tree_map_with_path(place, params)


def _check_compute_dtype(dtype: DTypeLike | None) -> None:
    try:
        known = dtype is None or jnp.dtype(dtype).name in (*MODEL_DTYPES, "float64")
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"dtype={dtype!r} is none to compute in; choose one of {', '.join(MODEL_DTYPES)}, or None")


def _check_format(format: str) -> None:
    if format not in get_args(Format):
        raise ValueError(f"format={format!r} is not one of {', '.join(get_args(Format))}")


def _write_model(directory: Path, model: Model, params: Any, format: Format) -> None:
    hf_config = json.loads(model.hf_config)
    source = hf_config.pop(SOURCE, None)
    check_parameters(model.config, params, model.stacked)
    if format in WRITERS:
        WRITERS[format](directory, params)
        write_json(directory / CONFIG, hf_config)
    else:
        if model.config.tie_embeddings and is_qtensor(params["embed_tokens"]["embedding"]):
            raise ValueError(
                f"embed_tokens/embedding is the output head too, and readers of {format} cannot share a quantized "
                "weight; leave it as it is, or format='jaxquant'"
            )
        tensors = tensors_from_params(model.config, fold(params, model.fold_pairs))
        FOREIGN[format].write(directory, hf_config, tensors, modules(model.config))
    if source is not None:
        copy_companions(Path(source), directory)
