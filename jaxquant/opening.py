"""Models on disk, opened but not read: where `models`, which knows names, meets `checkpoints`, which knows files."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from jaxquant.checkpoints.formats import FOREIGN, quantization_config
from jaxquant.checkpoints.huggingface import CONFIG, find_checkpoint
from jaxquant.checkpoints.json_file import read_json
from jaxquant.checkpoints.lora import Merged
from jaxquant.checkpoints.modules import QuantizedTensors, check_floats
from jaxquant.checkpoints.native import HEADER, read_tree
from jaxquant.checkpoints.orbax import Placement, is_orbax, read_orbax
from jaxquant.checkpoints.tensors import Tensors
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
    present_in_layer,
    tensor_names,
    tensor_paths,
)
from jaxquant.models.stacking import alike, is_stacked, layer_of, stack_layers, unstack_layers
from jaxquant.numerics.qtensor import holds_qtensors
from jaxquant.numerics.spec import QuantSpec
from jaxquant.transforms.tracing.interpreter import named_leaves

SOURCE = "_name_or_path"  # Hugging Face's key for where a configuration came from: here, the directory
_ONE_SPEC = "and a stack of layers has one spec"
_STORAGE = "quantization_config"  # how the tensors were stored, which is no property of the loaded model


def find_model(name: str | os.PathLike) -> Path:
    """The directory of a model: a local one, the packaged "tinylm", or one of the Hugging Face hub.

    Raises:
      FileNotFoundError: there is none.
    """
    packaged = os.fspath(name) == "tinylm" and not Path(name).exists()
    return TINYLM if packaged else find_checkpoint(name)


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

    def outer(self, only: str | None = None) -> dict[str, Any]:
        """The parameters outside of the layers, or one of their subtrees. Errors as `load_pretrained`."""
        if isinstance(self.source, dict):
            return {name: self.source[name] for name in (self.outer_names if only is None else [only])}
        return outer_params(self.model.config, self._tensors, only)

    @property
    def outer_names(self) -> list[str]:
        """The names of the subtrees outside of the layers."""
        names = (path.partition("/")[0] for path in parameter_shapes(self.model.config))
        return [name for name in dict.fromkeys(names) if name != "layers"]

    @property
    def outer_nbytes(self) -> int:
        """The bytes of the parameters outside of the layers, which must be floats."""
        if isinstance(self.source, dict):
            return sum(leaf.nbytes for leaf in jax.tree.leaves(self.outer()))
        paths = tensor_paths(self.model.config)
        return sum(self.source.nbytes(name) for name, path in paths.items() if not path.startswith("layers/"))

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """Some rows of the embedding, of a float model."""
        if isinstance(self.source, dict):
            return np.asarray(self.source["embed_tokens"]["embedding"])[tokens]
        paths = tensor_paths(self.model.config)
        return self._tensors[next(name for name in paths if paths[name] == "embed_tokens/embedding")][tokens]

    def layers(self, layers: range) -> dict[str, Any]:
        """The parameters of some layers, as `{"layers": ...}`, stacked. Errors as `load_pretrained`."""
        if not isinstance(self.source, dict):
            return layer_params(self.model.config, self._tensors, layers)
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

    def present(self, layer: int) -> dict[str, Any]:
        """Those parameters of a layer that are there, by their path in a stack; also of an incomplete checkpoint."""
        if isinstance(self.source, Tensors | QuantizedTensors):
            return present_in_layer(self.model.config, self.source, layer)
        return layer_of(self.source, layer)

    @property
    def uneven(self) -> str | None:
        """Why its layers cannot be stacked; None if they can."""
        if isinstance(self.source, QuantizedTensors):
            return _uneven(self.model.config, self.source.specs)
        if not isinstance(self.source, dict) or is_stacked(self.source):
            return None
        return None if alike(self.source) else f"its layers are not quantized alike, {_ONE_SPEC}"

    def stored(self) -> Iterator[tuple[str, np.ndarray]]:
        """What the parameters are made of, one array at a time, by its name in the file. Not for quantized ones."""
        if isinstance(self.source, dict):
            yield from ((path, np.asarray(leaf)) for path, leaf in named_leaves(self.source))
        else:
            yield from ((name, self._tensors[name]) for name in tensor_paths(self.model.config))

    @property
    def _tensors(self) -> Mapping[str, Any]:
        """The source, if it is one of tensors; float ones as maps of the files, because they are copied at once."""
        return self.source.mapped if isinstance(self.source, Tensors) else self.source

    @property
    def is_quantized(self) -> bool:
        """Whether some of it is quantized."""
        if isinstance(self.source, dict):
            return holds_qtensors(self.source)
        return isinstance(self.source, QuantizedTensors)


def open_pretrained(
    name: str | os.PathLike, sharding: Placement | None = None, adapter: str | os.PathLike | None = None
) -> Checkpoint:
    """Opens a model, without reading more than it must. Arguments and errors as `load_pretrained`."""
    directory = find_model(name)
    model, source = _opened(directory, sharding)
    if (directory / HEADER).is_file():
        check_parameters(model.config, source, is_stacked(source))
    else:
        check_names(model.config, source)
        check_dtypes(model.config, source.dtype)
        if isinstance(source, QuantizedTensors):
            _check_experts(directory, model.config, source.specs)
    if adapter is not None:
        if not isinstance(source, Tensors):
            raise ValueError(
                f"{directory}: an adapter is added to float checkpoints in Hugging Face's format only; give the one "
                "that this was made from"
            )
        source = Merged(source, find_checkpoint(adapter))
    return Checkpoint(directory, model, source)


def open_incomplete(directory: Path) -> Checkpoint:
    """Opens a model of which parameters may be missing, or have shapes that are not the model's.

    Only `present` reads it. Errors as `load_pretrained`, but for those.
    """
    return Checkpoint(directory, *_opened(directory, None))


def _opened(directory: Path, sharding: Placement | None) -> tuple[Model, Any]:
    """A model, and its source, which nothing has been compared with."""
    if holds_bare_tree(directory):
        raise ValueError(f"{directory} holds a parameter tree without a model; read it with jaxquant.load")
    hf_config = read_json(directory / CONFIG)
    plain = {key: value for key, value in hf_config.items() if key != _STORAGE}
    model = Model.from_hf({**plain, SOURCE: os.path.abspath(directory)})
    native = (directory / HEADER).is_file()
    return model, read_any_tree(directory, sharding) if native else _open(directory, hf_config, model.config)


def holds_bare_tree(directory: Path) -> bool:
    """Whether a directory holds a parameter tree without a model, which only `load` reads."""
    return (directory / HEADER).is_file() and not (directory / CONFIG).is_file()


def holds_orbax(directory: Path) -> bool:
    """Whether the arrays of a directory were written by Orbax."""
    return (directory / HEADER).is_file() and is_orbax(directory)


def stored_tensors(directory: Path, config: DecoderConfig) -> Tensors:
    """What lies in a Hugging Face directory, by the names that the whole model gives it."""
    tensors = Tensors(directory)
    return tensors.renamed(full_names(config, tensors))


def read_any_tree(directory: Path, sharding: Placement | None) -> Any:
    """The parameter tree of a directory in the native format or Orbax's. Errors as `load`."""
    return read_orbax(directory, sharding) if holds_orbax(directory) else read_tree(directory)


def _open(directory: Path, hf_config: Mapping[str, Any], config: DecoderConfig) -> Tensors | QuantizedTensors:
    """The tensors of a Hugging Face directory."""
    storage = quantization_config(directory, hf_config)
    if storage is None:
        floats = stored_tensors(directory, config)
        check_floats(directory, floats, [name for name in floats if not holds_nothing(config, name)])
        return floats
    dtype = hf_config.get("dtype", hf_config.get("torch_dtype"))
    read = FOREIGN[storage["quant_method"]].read
    source = read(directory, storage, modules(config), tensor_paths(config).keys(), dtype)
    head = FAMILIES[config.architecture].head.name
    if config.tie_embeddings and head in source.specs:
        raise ValueError(f"{directory}: {head} is quantized, but the output head is the embedding of this model")
    return source


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


def check_parameters(config: DecoderConfig, params: Any, stacked: bool) -> None:
    """Raises ValueError for the first parameter that is missing, left over or of another shape than the model's."""
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
