"""The command line: parses, calls, prints."""

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax
from jax.sharding import AxisType, Mesh
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxquant import inspection, workflows
from jaxquant.methods.awq import AWQ
from jaxquant.methods.chain import Chain
from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.llm_int8 import LLMInt8
from jaxquant.methods.rtn import RTN
from jaxquant.methods.smoothquant import SmoothQuant
from jaxquant.numerics.scale_search import Clip
from jaxquant.numerics.spec import ActivationSpec, QuantSpec
from jaxquant.transforms.stream import Predecessors

METHODS = ("rtn", "gptq", "awq", "smoothquant", "llm-int8", "awq+gptq", "smoothquant+gptq")
_READERS = {  # of the options that not every method reads
    "no_act_order": ("gptq",),
    "clip": ("rtn", "gptq", "awq"),
    "refine": ("gptq",),
    "alpha": ("smoothquant",),
    "threshold": ("llm-int8",),
}
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_quantize(commands)
    _add_evaluate(commands)
    _add_inspect(commands)
    return parser


def _add(commands, name: str, run, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_demo(commands) -> None:
    parser = _add(commands, "demo", _demo, "quantize the packaged model by every method at 8, 4, 3 and 2 bits")
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


def _add_quantize(commands) -> None:
    parser = _add(commands, "quantize", _quantize, "quantize the linear layers of a checkpoint")
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
    parser.add_argument("--format", choices=("jaxquant", "compressed-tensors"), default="jaxquant",
                        help="default: %(default)s")  # fmt: skip
    parser.add_argument("--predecessors", choices=get_args(Predecessors), default="quantized",
                        help="calibrate each layer behind the quantized layers before it, or behind the float ones "
                        "(default: %(default)s)")  # fmt: skip
    _add_mesh(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint in DIR")
    parser.add_argument("--no-resume", action="store_true",
                        help="begin anew where a run that writes DIR was not finished")  # fmt: skip


def _add_evaluate(commands) -> None:
    parser = _add(commands, "evaluate", _evaluate, "perplexity of a checkpoint, alone or against a baseline")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--baseline", metavar="MODEL", help="compare with this model on the same tokens")
    parser.add_argument("--data", metavar="FILE", help=DATA_HELP + "held-out files of Python's standard library")
    parser.add_argument("--context", type=int, default=512, metavar="T",
                        help="tokens that the model sees at once (default: %(default)s)")  # fmt: skip
    _add_mesh(parser)


def _add_inspect(commands) -> None:
    parser = _add(commands, "inspect", _inspect, "list the parameters of a checkpoint: sizes, codes, histograms")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def _demo(args) -> None:
    from jaxquant import demo  # draws with matplotlib, which no other command waits for

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)  # before the work, not after
    with _progress() as progress:
        result = demo.run(progress)
    files = demo.save(result, out)
    if args.json:
        return _print_json(dataclasses.asdict(result))
    caption = (
        f"float: {result.float_size / 1e6:.2f} MB, perplexity {result.float_perplexity:.3f}; "
        f"groups of {result.group_size}; {result.evaluation_tokens:,} held-out tokens"
    )
    table = Table(caption=caption, box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("method", "bits", "MB", "bits/w", "perplexity", "loss increase", "KL", "top-1", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    for row in result.rows:
        numbers = (f"{row.size / 1e6:.2f}", f"{row.bits_per_weight:.3f}", f"{row.perplexity:.3f}")
        increase = f"{row.loss_increase:+.4f} ±{row.loss_stderr:.4f}"
        rest = (f"{row.kl:.4f}", f"{row.top1_agreement:.1%}", f"{row.seconds:.1f}")
        table.add_row(row.method, f"W{row.bits}A{row.activation_bits}", *numbers, increase, *rest)
    Console().print(table)
    print("written:", *files)


def _quantize(args) -> None:
    config = _method_config(args)
    with _progress() as progress, _notes():
        report = workflows.quantize_checkpoint(
            args.model,
            args.out,
            config,
            calibration=args.calibration,
            num_samples=args.num_samples,
            seq_len=args.seq_len,
            field=args.field,
            pad=args.pad,
            seed=args.seed,
            format=args.format,
            predecessors=args.predecessors,
            overwrite=args.overwrite,
            resume=not args.no_resume,
            mesh=args.mesh,
            progress=progress,
        )
    if args.json:
        return _print_json({"out": args.out, "format": args.format, **report.to_dict()})
    Console().print(report.table())
    print(f"written: {args.out} ({args.format})")


def _method_config(args) -> Any:
    """The method config that the arguments of `quantize` describe; ValueError for one that the method does not read."""
    steps = args.method.split("+")
    for option, readers in _READERS.items():
        if getattr(args, option) not in (None, False) and not set(steps) & set(readers):
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"{flag} is read by --method {', '.join(readers)} only; leave it out")
    eight = args.method in ("smoothquant", "llm-int8")
    bits = (8 if eight else 4) if args.bits is None else args.bits
    group_size = 128 if args.group_size is None and not eight else args.group_size
    kind = args.activations or ("dynamic" if args.method == "smoothquant" else "none")
    activations = None if kind == "none" else ActivationSpec(static=kind == "static")
    group_size = None if args.per_channel else group_size
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=not args.asymmetric, activations=activations)
    gptq = {"act_order": not args.no_act_order, "clip": args.clip, "refine": args.refine or 0}
    made = {
        "rtn": lambda: RTN(spec, clip=args.clip),
        "gptq": lambda: GPTQ(spec, **gptq),
        "awq": lambda: AWQ(spec, clip=args.clip or AWQ.clip),
        "smoothquant": lambda: SmoothQuant(args.alpha, spec),
        "llm-int8": lambda: LLMInt8(LLMInt8.threshold if args.threshold is None else args.threshold, spec),
    }
    configs = [made[step]() for step in steps]
    return configs[0] if len(configs) == 1 else Chain(*configs)


def _evaluate(args) -> None:
    with _progress() as progress:
        result = workflows.evaluate_checkpoint(
            args.model,
            baseline=args.baseline,
            data=args.data,
            context=args.context,
            mesh=args.mesh,
            progress=progress,
        )
    comparison = result.comparison
    if args.json:
        return _print_json(result._asdict() | {"comparison": comparison and _plain(comparison)})
    print(f"perplexity {result.perplexity:.4f} ({result.tokens:,} tokens, context {result.context})")
    if comparison:
        print(f"baseline   {comparison.baseline_perplexity:.4f}")
        for name in ("loss_increase", "kl", "top1_agreement"):
            estimate = getattr(comparison, name)
            print(f"{name.replace('_', ' '):<15}{estimate.mean:+.5f} ± {estimate.stderr:.5f}")


def _inspect(args) -> None:
    found = inspection.inspect_checkpoint(args.model)
    if args.json:
        totals = {"stored_nbytes": found.stored_nbytes, "nbytes": found.nbytes}
        leaves = [leaf._asdict() | {"histogram": leaf.histogram._asdict()} for leaf in found.leaves]
        return _print_json({**totals, "left_aside_nbytes": found.left_aside_nbytes, "leaves": leaves})
    caption = f"{found.stored_nbytes:,} bytes on disk, {found.nbytes:,} bytes in memory"
    if found.left_aside_nbytes:
        caption += f"; {found.left_aside_nbytes:,} of those on disk are not loaded"
    table = Table(caption=caption, box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("parameter", "shape", "stored as", "on disk", "in memory", "histogram"):
        table.add_column(column, justify="right" if column in ("on disk", "in memory") else "left", overflow="fold")
    above: list[str] = []
    for leaf in found.leaves:
        *modules, name = leaf.path.split("/")
        for depth, module in enumerate(modules):
            if modules[: depth + 1] != above[: depth + 1]:
                table.add_row("  " * depth + module)
        above = modules
        table.add_row("  " * len(modules) + name, *_cells(leaf))
    Console(width=max(Console().width, 110)).print(table)  # a narrower table would be all folds


def _cells(leaf: inspection.Leaf) -> tuple[str, ...]:
    kind, histogram = leaf.stored_as, leaf.histogram
    if leaf.symmetric is None and histogram.values:
        kind += f", {histogram.values[0]:.2g} to {histogram.values[-1]:.2g}"
    if leaf.nonfinite:
        kind += f", {leaf.nonfinite:,} not finite"
    shape = "×".join(map(str, leaf.shape))
    return shape, kind, f"{leaf.stored_nbytes:,}", f"{leaf.nbytes:,}", histogram.bars()


def _plain(comparison) -> dict[str, Any]:
    return {k: v._asdict() if hasattr(v, "_asdict") else v for k, v in comparison._asdict().items()}


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN: None in its place, as for the standard error over a single window."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _progress() -> Iterator[workflows.Progress]:
    """Progress bars on standard error, one per kind of work."""
    columns = (TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield progress


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """What the library logs (how much memory it will take) on standard error, a line each."""
    logger, handler = logging.getLogger("jaxquant"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
