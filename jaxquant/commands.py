"""What the commands do: call the library, and print what it returns."""

import contextlib
import dataclasses
import json
import logging
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxquant import inspection, workflows, writing
from jaxquant.checkpoints.directory import check_writable, write_whole
from jaxquant.checkpoints.formats import FOREIGN
from jaxquant.kernels import tune as tuning
from jaxquant.methods.awq import AWQ
from jaxquant.methods.chain import Chain
from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.llm_int8 import LLMInt8
from jaxquant.methods.rtn import RTN
from jaxquant.methods.smoothquant import SmoothQuant
from jaxquant.models.generation import GREEDY, Sampling
from jaxquant.numerics.kv_cache import CacheSpec
from jaxquant.numerics.spec import ActivationSpec, QuantSpec

_READERS = {  # of the options that not every method reads
    "no_act_order": ("gptq",),
    "clip": ("rtn", "gptq", "awq"),
    "refine": ("gptq",),
    "alpha": ("smoothquant",),
    "threshold": ("llm-int8",),
}


def demo(args: Namespace) -> None:
    """Runs `jaxquant demo`. Errors as the library's."""
    from jaxquant import demo as demonstration  # draws with matplotlib, which no other command waits for

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)  # before the work, not after
    with _progress() as progress:
        result = demonstration.run(progress)
    files = demonstration.save(result, out)
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


def quantize(args: Namespace) -> None:
    """Runs `jaxquant quantize`. Errors as the library's."""
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
    scales = FOREIGN[args.format].fields if args.format in FOREIGN else {}
    spec = QuantSpec(bits, group_size, not args.asymmetric, activations=activations, **scales)
    outliers = 0 if args.format == "bitsandbytes" else None  # has no place for float weights
    gptq = {"act_order": not args.no_act_order, "clip": args.clip, "refine": args.refine or 0}
    made = {
        "rtn": lambda: RTN(spec, clip=args.clip),
        "gptq": lambda: GPTQ(spec, **gptq),
        "awq": lambda: AWQ(spec, clip=args.clip or AWQ.clip),
        "smoothquant": lambda: SmoothQuant(args.alpha, spec),
        "llm-int8": lambda: LLMInt8(LLMInt8.threshold if args.threshold is None else args.threshold, spec, outliers),
    }
    configs = [made[step]() for step in steps]
    return configs[0] if len(configs) == 1 else Chain(*configs)


def evaluate(args: Namespace) -> None:
    """Runs `jaxquant evaluate`. Errors as the library's."""
    if args.metric:
        return _evaluate_task(args)
    with _progress() as progress:
        result = workflows.evaluate_checkpoint(
            args.model,
            baseline=args.baseline,
            data=args.data,
            context=args.context,
            mesh=args.mesh,
            keep=args.keep,
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


def _evaluate_task(args) -> None:
    if args.data is None:
        raise ValueError(f"--metric {args.metric} needs --data, a .jsonl file of prompts and answers")
    options = {"baseline": args.baseline, "max_new_tokens": args.max_new_tokens, "keep": args.keep}
    with _progress() as progress:
        result = writing.evaluate_task(args.model, args.data, args.metric, **options, progress=progress)
    if args.json:
        return _print_json(_plain(result) | {"regressions": [r._asdict() for r in result.regressions]})
    print(f"{result.metric} of {result.examples:,} examples, with 95 % intervals")
    for name in ("score", "baseline", "difference"):
        found = getattr(result, name)
        if found is not None:
            print(f"{name:<11}{found.score:8.4f}  [{found.low:.4f}, {found.high:.4f}]")
    for worse in result.regressions:
        texts = (worse.prompt, worse.baseline_prediction, worse.prediction)
        print("worse, example {}: {!r}\n  baseline {!r}\n  model    {!r}".format(worse.example, *texts))


def generate(args: Namespace) -> None:
    """Runs `jaxquant generate`. Errors as the library's."""
    sampling = GREEDY if args.greedy else Sampling(args.temperature, args.top_k, args.top_p)
    cache = CacheSpec(args.cache_bits)
    writer = writing.Writer(workflows.TextSource(args.model), args.max_new_tokens, sampling, cache, args.seed)
    if args.json:
        return _print_json({"prompt": args.prompt, "text": writer.write([args.prompt])[0]})
    writer.write([args.prompt], lambda piece: print(piece, end="", flush=True))
    print()


def inspect(args: Namespace) -> None:
    """Runs `jaxquant inspect`. Errors as the library's."""
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


def tune(args: Namespace) -> None:
    """Runs `jaxquant tune`. Errors as the library's."""
    out, chip = check_writable(args.out), tuning.chip_of(jax.devices()[0])
    with _progress() as progress:
        found, failed = tuning.tune(chip, args.shapes, args.tokens, args.weights, progress=progress)
    about = {"jax": jax.__version__, "failed": failed}
    write_whole(out, found.to_json(about))
    if args.json:
        return _print_json({"out": args.out, "chip": chip, "rows": len(found.rows), **about})
    for line in failed:
        print("passed over:", line)
    print(f"written: {args.out} (tiles of {len(found.rows)} products on {chip}, {len(failed)} candidates passed over)")


def _cells(leaf: inspection.Leaf) -> tuple[str, ...]:
    kind, histogram = leaf.stored_as, leaf.histogram
    if leaf.symmetric is None and histogram.values:
        kind += f", {histogram.values[0]:.2g} to {histogram.values[-1]:.2g}"
    if leaf.nonfinite:
        kind += f", {leaf.nonfinite:,} not finite"
    shape = "×".join(map(str, leaf.shape))
    return shape, kind, f"{leaf.stored_nbytes:,}", f"{leaf.nbytes:,}", histogram.bars()


def report(args: Namespace) -> None:
    """Runs `jaxquant report`. Errors as the library's."""
    from jaxquant.reporting import page  # with a template engine, which no other command waits for
    from jaxquant.reporting.collect import collect

    check_writable(args.out)
    with _progress() as progress:
        found = collect(args.models, baseline=args.baseline, data=args.data, context=args.context, progress=progress)
    page.write(found, args.out)
    if args.json:
        rows = [_summary(row) for row in found.all_rows]
        return _print_json({"out": args.out, "tokens": found.tokens, "checkpoints": rows, "notes": list(found.notes)})
    for note in found.notes:
        print(f"note: {note}")
    print(f"written: {args.out}")


def _summary(row) -> dict[str, Any]:
    numbers = {"nbytes": row.nbytes, "perplexity": row.perplexity, "errors": row.errors}
    comparison = None if row.comparison is None else _plain(row.comparison)
    return {"name": row.name, **row.storage._asdict(), **numbers, "comparison": comparison}


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
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that has set up the root logger would repeat each line
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
