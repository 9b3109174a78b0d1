"""Models from and to disk: where `models`, which knows names, meets `checkpoints`, which knows files."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from jaxquant.checkpoints.compressed_tensors import (
    MODEL_DTYPES,
    CompressedTensors,
    check_floats,
    write_compressed_tensors,
)
from jaxquant.checkpoints.compressed_tensors_config import METHOD, check_spec
from jaxquant.checkpoints.directory import check_new_directory, new_directory
from jaxquant.checkpoints.huggingface import CONFIG, copy_companions, find_checkpoint
from jaxquant.checkpoints.json_file import read_json, write_json
from jaxquant.checkpoints.lora import Merged
from jaxquant.checkpoints.native import HEADER, load_tree, read_tree, write_tree
from jaxquant.checkpoints.tensors import Tensors
from jaxquant.kernels.prepare import prepare
from jaxquant.loading import quantized_params
from jaxquant.models import TINYLM
from jaxquant.models.config import FAMILIES, DecoderConfig
from jaxquant.models.model import Model
from jaxquant.models.names import (
    check_dtypes,
    check_names,
    full_names,
    holds_nothing,
    layer_params,
    modules,
    outer_params,
    parameter_shapes,
    tensor_names,
    tensor_paths,
    tensors_from_params,
)
from jaxquant.models.stacking import alike, is_stacked, stack_layers, unstack_layers
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import QuantSpec
from jaxquant.transforms.fold import fold
from jaxquant.transforms.tracing.interpreter import named_leaves

Format = Literal["jaxquant", "compressed-tensors"]
_SOURCE = "_name_or_path"  # Hugging Face's key for where a configuration came from: here, the directory
_ONE_SPEC = "and a stack of layers has one spec"
_STORAGE = "quantization_config"  # how the tensors were stored, which is no property of the loaded model


def find_model(name: str | os.PathLike) -> Path:
    """The directory of a model: a local one, the packaged "tinylm", or one of the Hugging Face hub.

    Raises:
      FileNotFoundError: there is none.
    """
    packaged = os.fspath(name) == "tinylm" and not Path(name).exists()
    return TINYLM if packaged else find_checkpoint(name)


def load_pretrained(
    name: str | os.PathLike,
    dtype: DTypeLike | None = None,
    *,
    stacked: bool | None = None,
    adapter: str | os.PathLike | None = None,
    quantize: Any = None,
) -> tuple[Model, Any]:
    """Loads a model and its parameters.

    Args:
      name: a local directory, a hub id ("owner/model"), or "tinylm", the model in the package. Read are float
        checkpoints in safetensors, what `save` writes in any format, and compressed-tensors' `pack-quantized`
        and `int-quantized` weights from elsewhere.
      dtype: of the computation; None takes that of the largest parameter.
      stacked: whether the layers are stacked, so that a scan runs over them ("layers/mlp/up_proj/kernel" is
        `[layers, in, out]`), or each has parameters of its own ("layers/0/mlp/up_proj/kernel") and may be quantized in
        its own way. None stacks them unless they are quantized differently.
      adapter: a directory or hub id of a LoRA adapter in PEFT's files, which is added to a float model's weights.
      quantize: a recipe, as for `quantize_params`, by which a float model is quantized while it is read: the floats of
        all layers are never in memory at once. Only for methods that need no statistics, such as `RTN`. A bare config
        takes the linear layers, as `Model.recipe` has it.

    Returns:
      `(model, params)`: `model.apply(params, tokens)` gives logits `[batch, time, vocab]`. Parameters have the dtype
      that they are stored in, quantized ones are QTensors.

    Raises:
      FileNotFoundError: there is no such checkpoint, or one of its files is missing.
      ValueError: a file is damaged, the architecture or the quantization is not supported, `dtype` is none to compute
        in, layers that are quantized differently are to be stacked, or the adapter is not plain LoRA, not the model's,
        or to be added to quantized weights, or `quantize` needs statistics, takes nothing, or the model is quantized.
    """
    checkpoint = open_pretrained(name, adapter)
    uneven = checkpoint.uneven
    if stacked is None:
        stacked = uneven is None
    if stacked and uneven is not None:
        raise ValueError(f"{checkpoint.directory}: {uneven}; load it with stacked=False")
    _check_compute_dtype(dtype)
    if quantize is not None and checkpoint.is_quantized:
        raise ValueError(f"{checkpoint.directory} is quantized already; leave out quantize={quantize!r}")
    params = checkpoint.params(stacked) if quantize is None else quantized_params(checkpoint, quantize, stacked)
    largest = max(jax.tree.leaves(params, is_leaf=is_qtensor), key=lambda leaf: leaf.size)
    model = checkpoint.with_dtype(largest.dtype if dtype is None else dtype).model
    return dataclasses.replace(model, stacked=stacked), params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk, whose parameters are read when they are asked for.

    Attributes:
      directory: where it lies.
      model: the model, computed in float32.
      source: its tensors by Hugging Face's names; of the native format, the parameter tree.
    """

    directory: Path
    model: Model
    source: Any

    def with_dtype(self, dtype: DTypeLike) -> "Checkpoint":
        """The same, computed in another dtype."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, dtype=jnp.dtype(dtype)))

    def outer(self) -> dict[str, Any]:
        """The parameters outside of the layers. Errors as `load_pretrained`."""
        if isinstance(self.source, dict):
            return {name: value for name, value in self.source.items() if name != "layers"}
        return outer_params(self.model.config, self.source)

    @property
    def outer_bytes(self) -> int:
        """The bytes of the parameters outside of the layers, which must be floats."""
        if isinstance(self.source, dict):
            return sum(leaf.nbytes for leaf in jax.tree.leaves(self.outer()))
        paths = tensor_paths(self.model.config)
        return sum(self.source.nbytes(name) for name, path in paths.items() if not path.startswith("layers/"))

    def layers(self, layers: range) -> dict[str, Any]:
        """The parameters of some layers, as `{"layers": ...}`, stacked. Errors as `load_pretrained`."""
        if not isinstance(self.source, dict):
            return layer_params(self.model.config, self.source, layers)
        if is_stacked(self.source):
            return {"layers": jax.tree.map(lambda a: a[layers.start : layers.stop], self.source["layers"])}
        return stack_layers({"layers": {str(i): self.source["layers"][str(i)] for i in layers}})

    def params(self, stacked: bool) -> dict[str, Any]:
        """All parameters. Errors as `load_pretrained`."""
        if isinstance(self.source, dict) and is_stacked(self.source) == stacked:
            return self.source
        count = self.model.config.num_layers
        if stacked:
            return self.outer() | self.layers(range(count))
        layers = {str(i): unstack_layers(self.layers(range(i, i + 1)))["layers"]["0"] for i in range(count)}
        return self.outer() | {"layers": layers}

    @property
    def uneven(self) -> str | None:
        """Why its layers cannot be stacked; None if they can."""
        if isinstance(self.source, CompressedTensors):
            return _uneven(self.model.config, self.source.specs)
        if not isinstance(self.source, dict) or is_stacked(self.source):
            return None
        return None if alike(self.source) else f"its layers are not quantized alike, {_ONE_SPEC}"

    def stored(self) -> Iterator[tuple[str, np.ndarray]]:
        """What the parameters are made of, one array at a time, by its name in the file. Not for quantized ones."""
        if isinstance(self.source, dict):
            yield from ((path, np.asarray(leaf)) for path, leaf in named_leaves(self.source))
        else:
            yield from ((name, self.source[name]) for name in tensor_paths(self.model.config))

    @property
    def is_quantized(self) -> bool:
        """Whether some of it is quantized."""
        if isinstance(self.source, dict):
            return any(map(is_qtensor, jax.tree.leaves(self.source, is_leaf=is_qtensor)))
        return isinstance(self.source, CompressedTensors)


def open_pretrained(name: str | os.PathLike, adapter: str | os.PathLike | None = None) -> Checkpoint:
    """Opens a model, without reading more than it must. Arguments and errors as `load_pretrained`."""
    directory = find_model(name)
    if holds_bare_tree(directory):
        raise ValueError(f"{directory} holds a parameter tree without a model; read it with jaxquant.load")
    hf_config = read_json(directory / CONFIG)
    storage = hf_config.pop(_STORAGE, None)
    model = Model.from_hf({**hf_config, _SOURCE: os.path.abspath(directory)})
    if (directory / HEADER).is_file():
        source = read_tree(directory)
        _check_parameters(model.config, source, is_stacked(source))
    else:
        source = _open(directory, storage, model.config)
        check_names(model.config, source)
        check_dtypes(model.config, source.dtype)
        if isinstance(source, CompressedTensors):
            _check_experts(directory, model.config, source.specs)
    if adapter is not None:
        if not isinstance(source, Tensors):
            raise ValueError(
                f"{directory}: an adapter is added to float checkpoints in Hugging Face's format only; give the one "
                "that this was made from"
            )
        source = Merged(source, find_checkpoint(adapter))
    return Checkpoint(directory, model, source)


def save(
    path: str | os.PathLike, model: Model | None, params: Any, *, format: Format = "jaxquant", overwrite: bool = False
) -> None:
    """Writes parameters, and the model's configuration and tokenizer, into a new directory.

    The tokenizer and the generation settings are copied from the directory that the model was loaded from.

    Args:
      path: the directory; it appears whole or not at all, after what was written has been read back.
      model: the model from `load_pretrained`. None writes a bare tree of any shape, for `load`.
      params: its parameters, quantized or not. Without a model: nested dicts, lists and tuples of arrays and QTensors.
      format: "jaxquant" keeps everything bit for bit; "compressed-tensors" is read by vLLM and transformers, and has
        no place for channel scales, which are folded into norms and linear layers.
      overwrite: replaces an existing checkpoint.

    Raises:
      FileExistsError: the directory exists, and is not empty or no checkpoint; see `new_directory`.
      ValueError: the format is unknown or cannot express the parameters, or these are not the model's.
      TypeError: the tree holds something that is no array, or the model is not one of jaxquant's.
    """
    _check_format(format)
    if model is None and format != "jaxquant":
        raise ValueError(f"format={format!r} needs a model; a bare tree is saved with format='jaxquant'")
    if not isinstance(model, Model | None):
        raise TypeError(
            f"model is a {type(model).__name__}; give a model from load_pretrained, or None for a bare tree"
        )
    params = prepare(params, None)  # files are the same for all platforms
    with new_directory(path, overwrite=overwrite) as directory:
        if model is None:
            write_tree(directory, params)
        else:
            _write_model(directory, model, params, format)


def check_save(
    path: str | os.PathLike, spec: QuantSpec, *, format: Format = "jaxquant", overwrite: bool = False
) -> None:
    """Checks, before hours of work, that `save` could write codes of `spec`. Arguments and errors as there."""
    _check_format(format)
    if format == "compressed-tensors":
        check_spec(spec)
    check_new_directory(path, overwrite=overwrite)


def load(path: str | os.PathLike) -> Any:
    """Reads the parameter tree of a directory that `save` wrote with format "jaxquant".

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged.
    """
    return load_tree(path)


def holds_bare_tree(directory: Path) -> bool:
    """Whether a directory holds a parameter tree without a model, which only `load` reads."""
    return (directory / HEADER).is_file() and not (directory / CONFIG).is_file()


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


def stored_tensors(directory: Path, config: DecoderConfig) -> Tensors:
    """What lies in a Hugging Face directory, by the names that the whole model gives it."""
    tensors = Tensors(directory)
    return tensors.renamed(full_names(config, tensors))


def _open(directory: Path, storage: Any, config: DecoderConfig) -> Tensors | CompressedTensors:
    """The tensors of a Hugging Face directory."""
    if storage is None:
        floats = stored_tensors(directory, config)
        check_floats(directory, floats, [name for name in floats if not holds_nothing(config, name)])
        return floats
    method = storage.get("quant_method") if isinstance(storage, dict) else storage
    if method != METHOD:
        raise ValueError(f"{directory / CONFIG}: quant_method={method!r} is not read; supported: {METHOD}")
    return CompressedTensors(directory, storage, modules(config))


def _uneven(config: DecoderConfig, specs: Mapping[str, QuantSpec]) -> str | None:
    """What is not quantized alike in all layers; None if all is."""
    for entry in FAMILIES[config.architecture].tensors:
        found = {specs.get(name) for name in tensor_names(config, entry)}
        if len(found) > 1:
            return f"{entry.name} is not quantized alike in all layers ({', '.join(map(str, found))}), {_ONE_SPEC}"
    return None


def _check_experts(directory: Path, config: DecoderConfig, specs: Mapping[str, QuantSpec]) -> None:
    for entry in FAMILIES[config.architecture].tensors:
        names = tensor_names(config, entry) if entry.of_experts else []
        for start in range(0, len(names), config.num_experts or 1):
            found = {name: specs.get(name) for name in names[start : start + config.num_experts]}
            if len(set(found.values())) > 1:
                raise ValueError(f"{directory}: experts of one layer are stacked, but not quantized alike: {found}")


def _check_parameters(config: DecoderConfig, params: Any, stacked: bool) -> None:
    expected = parameter_shapes(config, stacked)
    flat = traverse_util.flatten_dict(params) if isinstance(params, dict) else {}
    found = {"/".join(p if isinstance(p, str) else repr([p]) for p in path): leaf for path, leaf in flat.items()}
    for path in sorted(expected.keys() | found.keys()):
        shape = getattr(found.get(path), "shape", None)
        if shape != expected.get(path):
            raise ValueError(
                f"params: {path} has shape {shape}, but the {config.architecture} of config.json has "
                f"{expected.get(path)}; None means that there is none"
            )


def _write_model(directory: Path, model: Model, params: Any, format: Format) -> None:
    hf_config = json.loads(model.hf_config)
    source = hf_config.pop(_SOURCE, None)
    _check_parameters(model.config, params, model.stacked)
    if format == "jaxquant":
        write_tree(directory, params)
        write_json(directory / CONFIG, hf_config)
    else:
        if model.config.tie_embeddings and is_qtensor(params["embed_tokens"]["embedding"]):
            raise ValueError(
                "embed_tokens/embedding is the output head too, and readers of compressed-tensors cannot share a "
                "quantized weight; leave it as it is, or format='jaxquant'"
            )
        tensors = tensors_from_params(model.config, fold(params, model.fold_pairs))
        write_compressed_tensors(directory, hf_config, tensors, modules(model.config))
    if source is not None:
        copy_companions(Path(source), directory)
