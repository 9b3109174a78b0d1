"""Quantizes a checkpoint layer by layer, from one directory to another, and goes on after a kill."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxquant.checkpoints.resumable import Run, resumable_directory
from jaxquant.evaluation.data import Samples
from jaxquant.models.names import parameter_shapes
from jaxquant.opening import SOURCE, Checkpoint
from jaxquant.parts import ModelParts
from jaxquant.preflight import Preflight
from jaxquant.pretrained import Format
from jaxquant.transforms.memory import types_bytes
from jaxquant.transforms.meshes import placed, put_batch
from jaxquant.transforms.recipe import resolve
from jaxquant.transforms.report import Report, stacked_reports
from jaxquant.transforms.stream import Predecessors, Stream
from jaxquant.transforms.tracing.interpreter import is_matrix, named_leaves

Progress = Callable[[str, int, int], None]  # (what, done, in all)

_PIECE = 2**22  # entries that are looked at together


@dataclasses.dataclass(frozen=True)
class LayerByLayer:
    """What is made of a checkpoint, and of which data.

    Attributes:
      checkpoint: the float model.
      rules: a recipe for the parameters of a layer, as `Model.layer_rules` gives.
      samples: to calibrate with; None for methods that need no calibration.
      batch_tokens: how many of their tokens run together.
      format: of the files.
      predecessors: as for `Stream`.
      mesh: devices that work together, with axes "data" and "model"; None for one.
    """

    checkpoint: Checkpoint
    rules: Sequence[tuple[str, Any]]
    samples: Samples | None
    batch_tokens: int
    format: Format
    predecessors: Predecessors
    mesh: Mesh | None = None

    def run(self, path: str | os.PathLike, *, overwrite: bool, resume: bool, progress: Progress) -> Report:
        """Quantizes the model into a directory. Arguments and errors as `quantize_checkpoint`."""
        stream = self._stream()
        self._begin(stream, path)
        with resumable_directory(path, self.fingerprint(), overwrite=overwrite, resume=resume) as run:
            self._quantize_layers(run, stream, progress)
            for name in self.checkpoint.outer_names[len(run.notes) - self._count :]:
                self._copy(run, name)
            run.index()
            self._parts.finish(run.directory, run.notes)
            return self._report(run.notes)

    def fingerprint(self) -> dict[str, str]:
        """All that decides what is written; reads the whole checkpoint. Raises ValueError for what is not finite."""
        return {
            "model": _digest(self.checkpoint),
            "recipe": f"{self.rules}, predecessors={self.predecessors}",
            "data": "none" if self.samples is None else f"{self.samples.sha256}, {self.batch_tokens} tokens together",
            "format": self.format,
            "version": f"jaxquant {metadata.version('jaxquant')}, JAX {jax.__version__}",
            "devices": f"{jax.devices()[0].device_kind} {dict(self.mesh.shape) if self.mesh else 1}",
        }

    @property
    def _count(self) -> int:
        return self.checkpoint.model.config.num_layers

    @property
    def _batches(self) -> list[Samples]:
        samples = self.samples
        return [] if samples is None else samples.batches(max(1, self.batch_tokens // samples.tokens.shape[1]))

    @property
    def _parts(self) -> ModelParts:
        return ModelParts(self.checkpoint.model, self.format)

    def _stream(self) -> Stream:
        apply, masks = self.checkpoint.model.blocks.apply, [batch.real for batch in self._batches]
        return Stream(apply, self.rules, None, masks=masks, predecessors=self.predecessors)

    def _begin(self, stream: Stream, path: str | os.PathLike) -> None:
        layer = self._layer(0)
        self._preflight(stream, layer).check(path)
        stream.compile_ahead(layer)  # while the checkpoint is read for its fingerprint

    def _preflight(self, stream: Stream, layer: dict[str, Any]) -> Preflight:
        tokens, activations, held, calibration = 0, 0, 0, None
        if self.samples is not None:
            batch, tokens = self._batches[0], self.samples.tokens.size
            x = self._embedded(batch)
            calibration = stream.prepare(layer, x, batch.real)
            activations, held = (size * tokens // batch.tokens.size for size in (x.nbytes, calibration.held))
        leaves = {path: leaf for path, leaf in named_leaves(layer) if path != "windows"}
        weights = {path for path, leaf in leaves.items() if is_matrix(leaf)}
        return Preflight(
            leaves,
            resolve(self.rules, leaves, weights),
            self._count,
            self.checkpoint.outer_nbytes,
            activations,
            held,
            tokens,
            calibration,
        )

    def _quantize_layers(self, run: Run, stream: Stream, progress: Progress) -> None:
        """Quantizes and writes the layers that are not done yet."""
        first = len(run.notes)
        if first >= self._count:
            return

        def calibrating(layer: int, done: int, total: int) -> None:
            progress("calibrating", layer * total + done, self._count * total)

        stream.inputs = self._inputs(run)
        for layer in range(first, self._count):
            self._quantize_layer(run, stream, layer, functools.partial(calibrating, layer))
            progress("quantizing", layer + 1, self._count)

    def _layer(self, layer: int) -> dict[str, Any]:
        windows = {"windows": self.checkpoint.model.blocks.windows[layer : layer + 1]}
        return placed(self.checkpoint.layers(range(layer, layer + 1)) | windows, self.mesh)

    def _quantize_layer(self, run: Run, stream: Stream, layer: int, progress: Callable[[int, int], None]) -> None:
        last = layer + 1 == self._count
        tree, report = stream.quantize(self._layer(layer), last=last, progress=progress)
        state = {} if stream.inputs is None or last else {f"{i:06d}": x for i, x in enumerate(stream.inputs)}
        run.add(functools.partial(self._write_layer, layer, {"layers": tree["layers"]}, report), state)

    def _inputs(self, run: Run) -> list[jax.Array] | None:
        """The inputs of the layer that comes next."""
        if self.samples is None:
            return None
        if run.notes:
            state = run.state()
            return [put_batch(state.pop(name), self.mesh) for name in sorted(state)]
        return [self._embedded(batch) for batch in self._batches]

    def _embedded(self, batch: Samples) -> jax.Array:
        """The input of the first layer."""
        rows = self.checkpoint.rows(batch.tokens.reshape(-1))  # not the whole embedding, which may be large
        places = np.arange(batch.tokens.size, dtype=np.int32).reshape(batch.tokens.shape)
        tables = {**self._other_tables, "embed_tokens": {"embedding": jnp.asarray(rows)}}
        return put_batch(self.checkpoint.model.blocks.embed(tables, jnp.asarray(places)), self.mesh)

    @functools.cached_property
    def _other_tables(self) -> dict[str, Any]:
        """Tables of embeddings beside that of tokens: learned positions, which are few."""
        names = (name for name in self.checkpoint.outer_names if name.startswith("embed_") and name != "embed_tokens")
        return {key: table for name in names for key, table in self.checkpoint.outer(name).items()}

    def _write_layer(self, layer: int, params: Mapping[str, Any], report: Report, directory: Path) -> dict[str, Any]:
        note = self._parts.write_layer(directory, layer, params)
        return {**note, "report": report.to_dict(), "nbytes": types_bytes(params)}

    def _copy(self, run: Run, name: str) -> None:
        outer = self.checkpoint.outer(name)
        run.add(lambda directory: {**self._parts.write_outer(directory, outer), "nbytes": types_bytes(outer)})

    def _report(self, notes: Sequence[Mapping[str, Any]]) -> Report:
        """The report on the whole model."""
        report = stacked_reports([Report.from_dict(note["report"]) for note in notes[: self._count]])
        quantized, after = {row.path for row in report.layers}, sum(note["nbytes"] for note in notes)
        paths = sorted(parameter_shapes(self.checkpoint.model.config), key=lambda path: path.split("/"))
        return dataclasses.replace(
            report,
            unchanged=tuple(path for path in paths if path not in quantized),
            bytes_before=after + report.bytes_before - report.bytes_after,
            bytes_after=after,
        )


def _digest(checkpoint: Checkpoint) -> str:
    """A checksum of a model. Raises ValueError for what is not finite, before hours of work."""
    config = json.loads(checkpoint.model.hf_config)
    config.pop(SOURCE, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, array in checkpoint.stored():
        bad, flat = 0, array.reshape(-1)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        for start in range(0, flat.size, _PIECE):
            piece = np.ascontiguousarray(flat[start : start + _PIECE])
            bad += piece.size - int(np.count_nonzero(np.isfinite(piece)))
            digest.update(piece.view(np.uint8).data)
        if bad:
            where = f"{checkpoint.directory}: {name}"
            raise ValueError(f"{where}: {bad} of its {array.size} entries are not finite; repair it first")
    return digest.hexdigest()
