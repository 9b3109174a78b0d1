"""Models written to disk in parts: each layer, and each parameter outside of the layers, when it is there.

Every part is written, and read back to be sure, as the format's own writer and reader do with whole models; what they
say about it is kept in a note, from which the configuration of the whole model is made in the end.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxquant.checkpoints.formats import FOREIGN
from jaxquant.checkpoints.huggingface import CONFIG, copy_companions
from jaxquant.checkpoints.json_file import write_json
from jaxquant.checkpoints.modules import write_config
from jaxquant.checkpoints.native import header_of, spec_of, write_header, write_tree
from jaxquant.checkpoints.tensors import write_tensors
from jaxquant.models.model import Model
from jaxquant.models.names import modules, some_tensors
from jaxquant.models.stacking import unstack_layers
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.opening import SOURCE
from jaxquant.pretrained import Format
from jaxquant.transforms.fold import fold

FORMATS = ("jaxquant", *FOREIGN)  # that can be written in parts


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """How the parts of a model are written in one format.

    Attributes:
      model: the model; its layers are written one by one, and read as a stack again.
      format: one of `FORMATS`.
    """

    model: Model
    format: Format

    def write_layer(self, directory: Path, layer: int, params: Mapping[str, Any]) -> dict[str, Any]:
        """Writes one layer into an empty directory.

        Args:
          directory: where to.
          layer: its number.
          params: `{"layers": ...}`, a stack of this layer alone, quantized.

        Returns:
          What `finish` is to know of it, as JSON knows it.

        Raises:
          ValueError: the format cannot express the parameters.
          OSError: the disk refuses, or what it returns is not what was written.
        """
        if self.format == "jaxquant":
            return self._write_tree(directory, {"layers": {str(layer): unstack_layers(params)["layers"]["0"]}})
        config = self.model.config
        tensors = some_tensors(config, fold(params, self.model.fold_pairs), range(layer, layer + 1))
        FOREIGN[self.format].write(directory, {}, tensors, modules(config))
        quantized = {name.removesuffix(".weight"): leaf for name, leaf in tensors.items() if is_qtensor(leaf)}
        dtype = next(iter(quantized.values())).dtype
        return {"specs": {name: dataclasses.asdict(q.spec) for name, q in quantized.items()}, "dtype": dtype}

    def write_outer(self, directory: Path, params: Mapping[str, Any]) -> dict[str, Any]:
        """Writes some parameters from outside of the layers. Arguments, result and errors as those of `write_layer`."""
        if self.format == "jaxquant":
            return self._write_tree(directory, params)
        write_tensors(directory, some_tensors(self.model.config, params, range(0)))
        return {}

    def finish(self, directory: Path, notes: Sequence[Mapping[str, Any]]) -> None:
        """Adds what makes a checkpoint of a directory with the tensors of all parts and their index.

        Raises:
          ValueError, OSError: it cannot be read.
        """
        hf_config = json.loads(self.model.hf_config)
        source = hf_config.pop(SOURCE, None)
        if self.format == "jaxquant":
            write_header(directory, [note["tree"] for note in notes])
            write_json(directory / CONFIG, hf_config)
        else:
            specs = {name: spec_of(spec) for note in notes for name, spec in note.get("specs", {}).items()}
            foreign = FOREIGN[self.format]
            described = foreign.describe(specs, modules(self.model.config))
            write_config(directory, hf_config, notes[0]["dtype"], described, foreign.copy)
        if source is not None:
            copy_companions(Path(source), directory)

    def _write_tree(self, directory: Path, params: Any) -> dict[str, Any]:
        write_tree(directory, params)
        return {"tree": header_of(directory)}
