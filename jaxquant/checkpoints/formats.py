"""The formats of quantized Hugging Face checkpoints, by the `quant_method` of their configurations."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxquant.checkpoints import awq, bitsandbytes, compressed_tensors, compressed_tensors_config, gptq, gptq_config
from jaxquant.checkpoints.huggingface import CONFIG, OLD_CONFIGS
from jaxquant.checkpoints.json_file import read_json
from jaxquant.checkpoints.modules import QuantizedTensors
from jaxquant.numerics.spec import QuantSpec


class Foreign(NamedTuple):
    """How one format is written and read.

    Attributes:
      fields: of a QuantSpec whose scales the format has a place for.
      check_spec: `check_spec(spec)` raises ValueError for codes that the format cannot express.
      write: as `compressed_tensors.write_compressed_tensors`.
      describe: `describe(specs, classes)` is the `quantization_config` of quantized modules among those of a model.
      copy: as for `modules.write_config`.
      read: arguments as `modules.HalfScaledTensors`.
    """

    fields: Mapping[str, Any]
    check_spec: Callable[[QuantSpec], None]
    write: Callable[[Path, Mapping[str, Any], Mapping[str, Any], Mapping[str, str]], None]
    describe: Callable[[Mapping[str, QuantSpec], Mapping[str, str]], dict[str, Any]]
    read: Callable[[Path, Mapping[str, Any], Mapping[str, str], Collection[str], str | None], QuantizedTensors]
    copy: str | None = None


HALF = {"scale_dtype": "float16"}
FOREIGN = {
    compressed_tensors_config.METHOD: Foreign(
        {},
        compressed_tensors_config.check_spec,
        compressed_tensors.write_compressed_tensors,
        compressed_tensors_config.describe,
        lambda directory, config, classes, names, model_dtype: compressed_tensors.CompressedTensors(
            directory, config, classes
        ),
    ),
    gptq_config.METHOD: Foreign(
        HALF,
        gptq_config.check_spec,
        gptq.write_gptq,
        gptq_config.describe,
        gptq.GPTQTensors,
        gptq_config.COPY,
    ),
    bitsandbytes.METHOD: Foreign(
        {"narrow_range": True, "scale_dtype": "float32"},
        bitsandbytes.check_spec,
        bitsandbytes.write_bitsandbytes,
        bitsandbytes.describe,
        bitsandbytes.BitsAndBytesTensors,
    ),
    awq.METHOD: Foreign(HALF, awq.check_spec, awq.write_awq, awq.describe, awq.AWQTensors),
}


def quantization_config(directory: Path, hf_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a directory says about how its tensors are stored: in config.json, or in a file of its own as older ones do.

    None for floats.

    Raises:
      ValueError: the method is not one of `FOREIGN`, or a file is damaged.
    """
    given = hf_config.get("quantization_config")
    file = CONFIG
    if given is None:
        file = next((name for name in OLD_CONFIGS if (directory / name).is_file()), CONFIG)
        if file == CONFIG:
            return None
        given = {"quant_method": OLD_CONFIGS[file], **read_json(directory / file)}
    if not isinstance(given, dict):
        raise ValueError(f"{directory / file}: quantization_config={given!r} is not supported; expected an object")
    method = given.get("quant_method")
    if method not in [*FOREIGN]:
        raise ValueError(f"{directory / file}: quant_method={method!r} is not read; supported: {', '.join(FOREIGN)}")
    return given
