"""The command line: parses, and calls `commands`."""

import argparse
import io
import math
import sys
from typing import get_args

import jax
from jax.sharding import AxisType, Mesh

from jaxquant import commands
from jaxquant.evaluation.task_metrics import METRICS
from jaxquant.kernels.tune import SHAPES, TOKENS, WEIGHTS
from jaxquant.numerics.scale_search import Clip
from jaxquant.parts import FORMATS
from jaxquant.transforms.stream import Predecessors
from jaxquant.workflows import KEPT

METHODS = ("rtn", "gptq", "awq", "smoothquant", "llm-int8", "awq+gptq", "smoothquant+gptq")
MODEL_HELP = 'directory of a checkpoint, hub id, or "tinylm" for the packaged model'
DATA_HELP = "file of text (.txt, .jsonl with a text field) or token ids (.npy, flat or [samples, time]); default: "


def main(argv: list[str] | None = None) -> int:
    """Runs one command. The exit status: 0; 1 for bad input (one line says which), 2 for usage, 130 if interrupted."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "×" is no reason to fail after the work
    try:
        args.run(args)
    except (ValueError, OSError) as error:  # what this package raises for bad input; anything else is a defect
        print(f"jaxquant: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxquant: interrupted", file=sys.stderr)
        return 130  # as a shell reports a process that was interrupted
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jaxquant", description="Quantizes large language models in JAX.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(subparsers)
    _add_quantize(subparsers)
    _add_evaluate(subparsers)
    _add_inspect(subparsers)
    _add_generate(subparsers)
    _add_report(subparsers)
    _add_tune(subparsers)
    return parser


def _add(subparsers, name: str, run, help: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_demo(subparsers) -> None:
    parser = _add(
        subparsers, "demo", commands.demo, "quantize the packaged model by every method at 8, 4, 3 and 2 bits"
    )
    parser.add_argument(
        "--out", default="jaxquant-demo", help="directory for the table and plots (default: %(default)s)"
    )


def _add_mesh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", type=_mesh, metavar="DxM",
                        help='devices that work together: "2x4" has samples on 2, output channels on 4')  # fmt: skip


def _mesh(text: str) -> Mesh:
    """The mesh of a shape "2x4", on the first devices there are."""
    shape, devices = tuple(int(n) for n in text.split("x") if n.isdecimal()), jax.devices()
    if len(shape) != 2 or math.prod(shape) not in range(1, len(devices) + 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no mesh of 1 to {len(devices)} devices; write for example 1x1")
    return jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2, devices=devices[: math.prod(shape)])


def _add_quantize(subparsers) -> None:
    parser = _add(subparsers, "quantize", commands.quantize, "quantize the linear layers of a checkpoint")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--method", choices=METHODS, default="gptq", help="default: %(default)s")
    parser.add_argument("--bits", type=int, metavar="B",
                        help="2 to 8 (default: 4; smoothquant, llm-int8: 8)")  # fmt: skip
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--group-size", type=int, metavar="G",
                       help="input channels that share a scale (default: 128; smoothquant, llm-int8: all)")  # fmt: skip
    group.add_argument("--per-channel", action="store_true", help="one scale per output channel")
    parser.add_argument("--asymmetric", action="store_true", help="use zero points")
    parser.add_argument("--activations", choices=("none", "dynamic", "static"),
                        help="round the inputs of products to 8 bits: by token as they come, or by calibrated ranges "
                        "(default: none; smoothquant: dynamic)")  # fmt: skip
    parser.add_argument("--no-act-order", action="store_true", help="GPTQ: keep the order of the input channels")
    parser.add_argument("--clip", choices=get_args(Clip),
                        help="RTN, GPTQ, AWQ: clip scales by this error (default: none; awq: output)")  # fmt: skip
    parser.add_argument("--refine", type=int, metavar="ROUNDS",
                        help="GPTQ: improve scales and codes afterwards, so many times (default: 0)")  # fmt: skip
    parser.add_argument("--alpha", type=float,
                        help="SmoothQuant: 0 to 1 (default: searched for each weight)")  # fmt: skip
    parser.add_argument("--threshold", type=float, help="LLM.int8(): size of an outlier (default: 6.0)")
    parser.add_argument("--calibration", metavar="DATA",
                        help="data set of the hub (owner/name, owner/name:config), or " + DATA_HELP
                        + "Python's standard library")  # fmt: skip
    parser.add_argument("--field", default="text", metavar="NAME",
                        help="what the text is called in a .jsonl file or data set (default: %(default)s)")  # fmt: skip
    parser.add_argument("--pad", action="store_true",
                        help="a document per sample, cut or padded (default: a stream, cut into samples)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the choice among documents (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seq-len", type=int, default=512, metavar="T", help="tokens per sample (default: %(default)s)"
    )
    parser.add_argument("--format", choices=FORMATS, default="jaxquant",
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--predecessors", choices=get_args(Predecessors), default="quantized",
                        help="calibrate each weight behind the quantized ones before it, or behind the float ones "
                        "(default: %(default)s)")  # fmt: skip
    _add_mesh(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint in DIR")
    parser.add_argument("--no-resume", action="store_true",
                        help="begin anew where a run that writes DIR was not finished")  # fmt: skip


def _add_evaluate(subparsers) -> None:
    parser = _add(subparsers, "evaluate", commands.evaluate, "perplexity of a checkpoint, alone or against a baseline")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--baseline", metavar="MODEL", help="compare with this model on the same tokens")
    _add_data(parser)
    parser.add_argument("--metric", choices=METRICS,
                        help="score what the model writes: --data is .jsonl of prompt and reference (for instruction: "
                        "of prompt and properties)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N",
                        help="with --metric: tokens to write (default: %(default)s)")  # fmt: skip
    parser.add_argument("--keep", default=KEPT, metavar="DIR",
                        help="where results are kept as they come, for a run that is interrupted to go on; with "
                        "--metric the texts stay there (default: %(default)s)")  # fmt: skip
    _add_mesh(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE", help=DATA_HELP + "held-out files of Python's standard library")
    parser.add_argument("--context", type=int, default=512, metavar="T",
                        help="tokens that the model sees at once (default: %(default)s)")  # fmt: skip


def _add_report(subparsers) -> None:
    what = "write a page on quantized checkpoints: sizes, quality, errors by layer, activations, texts"
    parser = _add(subparsers, "report", commands.report, what)
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL_HELP)
    parser.add_argument("--baseline", metavar="MODEL", help="the float model that they were made from")
    _add_data(parser)
    parser.add_argument("--out", default="report.html", metavar="FILE", help="file to write (default: %(default)s)")


def _add_generate(subparsers) -> None:
    parser = _add(subparsers, "generate", commands.generate, "write on from a prompt")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompt", metavar="PROMPT", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N",
                        help="tokens to write (default: %(default)s)")  # fmt: skip
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the draws (default: %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P",
                        help="draw from the likeliest tokens of this probability (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--cache-bits", type=int, metavar="B",
                        help="round keys and values of past tokens to 2 to 8 bits (default: not at all)")  # fmt: skip


def _add_inspect(subparsers) -> None:
    what = "list the parameters of a checkpoint: sizes, codes, histograms"
    parser = _add(subparsers, "inspect", commands.inspect, what)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def _add_tune(subparsers) -> None:
    what = "time how kernels could be cut, on this machine's TPU or GPU, for `prepare(..., tiles=FILE)`"
    parser = _add(subparsers, "tune", commands.tune, what)
    parser.add_argument("--out", default="jaxquant-tiles.json", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, metavar="KxN",
                        help="inputs and outputs of weights (default: those of a model with 8 billion)")  # fmt: skip
    parser.add_argument("--tokens", type=_count, nargs="+", default=TOKENS, metavar="M",
                        help=f"rows of inputs (default: {' '.join(map(str, TOKENS))})")  # fmt: skip
    parser.add_argument("--weights", choices=WEIGHTS, nargs="+", default=("w4g128", "w8"),
                        help="bits of weights, groups, bits of inputs (default: w4g128 w8)")  # fmt: skip


def _shape(text: str) -> tuple[int, int]:
    k, cross, n = text.partition("x")
    if not (cross and k.isdecimal() and n.isdecimal() and int(k) and int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write for example 4096x14336")
    return int(k), int(n)


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write for example 16")
    return int(text)
