"""Applies methods to the weights of a parameter tree, equal shapes together."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from jaxquant.numerics.bits import packed, split_bits
from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.numerics.statistics import InputStatistics
from jaxquant.transforms import choose, memory, meshes, sharing
from jaxquant.transforms.calibrate import ProductStatistics, Statistics
from jaxquant.transforms.choose import Solved
from jaxquant.transforms.jobs import Job, Span, chunks, count_not_finite, take
from jaxquant.transforms.judge import FALLBACKS, Fallback
from jaxquant.transforms.programs import needed_memory, run
from jaxquant.transforms.recipe import name_of, needs_statistics, resolve, rules_of
from jaxquant.transforms.report import LayerReport, Report
from jaxquant.transforms.tracing.interpreter import is_matrix, named_leaves

# Without statistics, leaves that have one of these in their name, or are in a norm, are no weights.
NOT_WEIGHTS = ("scale", "bias", "embed", "norm", "gain", "gamma", "beta")


def quantize_params(
    params: Any, stats: Statistics | None, recipe: Any, *, progress: Callable[[int, int], None] | None = None
) -> tuple[Any, Report]:
    """Quantizes the weights of a parameter tree.

    No matrix is ever kept that does worse than rounding to nearest on held-out calibration tokens: it falls back to
    that, and so does one whose input saw no token. The report says so.

    How much memory it will take is logged, at level INFO of the logger "jaxquant", before the first matrix is solved.

    Args:
      params: any pytree of arrays.
      stats: from `calibrate`, with the same tree. None for methods that need none: weights are then Flax's
        `[..., in, out]`, namely float leaves of two or more axes. Those whose names say that they are a scale, a bias,
        an embedding or a norm's are taken only by a rule that names them, such as `".*/embedding"`.
      recipe: a method config for every weight that a product consumes, or rules `[(pattern, config or None), ...]`;
        see `recipe.resolve`. Embeddings whose rows are only looked up are quantized per row if a rule names them.
      progress: called with (matrices done, matrices in all).

    Returns:
      The tree with QTensors in place of the weights taken, and a Report.

    Raises:
      ValueError: a weight with entries that are not finite, a group size that does not divide the inputs, a method
        without the statistics it needs, a rule that takes nothing, or more memory needed than is available. Nothing is
        computed before all of it is checked.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> params = {"w": jnp.linspace(-1, 1, 128).reshape(64, 2), "bias": jnp.zeros(2)}
      >>> qparams, report = jq.quantize_params(params, None, jq.RTN(jq.int4(group_size=32)))
      >>> qparams["w"].bits_per_weight, report.unchanged  # 4 bits, and a float32 scale for 32 of them
      (5.0, ('bias',))
    """
    twins = meshes.automatic_twins(params)
    with meshes.set_one(twins):
        params, stats = meshes.moved(params, twins), meshes.moved_statistics(stats, twins)
        jobs = plan(dict(named_leaves(params, is_qtensor)), stats, recipe)
        memory.ensure_fits(needed_memory(jobs), params)
        tree, report = run_jobs(jobs, params, stats, progress)
    return meshes.moved(tree, {there: here for here, there in twins.items()}), report


def run_jobs(
    jobs: list[Job], params: Any, stats: Statistics | None, progress: Callable[[int, int], None] | None
) -> tuple[Any, Report]:
    """Quantizes what was planned. Arguments and result as those of `quantize_params`."""
    total, done = sum(job.count for job in jobs for _ in choose.candidates(job)), 0

    def tick(matrices: int) -> None:
        nonlocal done
        done += matrices
        if progress is not None:
            progress(done, total)

    with threadpool_limits(1, "blas"):  # LAPACK's threads go on waiting in loops, and keep XLA's from the processor
        found = choose.solve(jobs, functools.partial(_solve_with_scales, tick=tick))
    named = dict(named_leaves(params, is_qtensor))
    structure = jax.tree.structure(params, is_leaf=is_qtensor)
    tree = jax.tree.unflatten(structure, [found[path].q if path in found else leaf for path, leaf in named.items()])
    rows = tuple(row for path in named if path in found for row in found[path].rows)
    unchanged = tuple(path for path in named if path not in found)
    return tree, Report(rows, unchanged, _notes(stats), _nbytes(params), _nbytes(tree))


def _solve_with_scales(jobs: list[Job], tick: Callable[[int], None]) -> dict[str, Solved]:
    """Solves jobs whose configs are settled; calls `tick` with numbers of matrices that are done."""
    jobs = sharing.with_channel_scales(jobs)
    found = _solve_all(jobs, tick)
    again = sharing.without_lost_scales(jobs, {path: solved.rows for path, solved in found.items()})
    return found | _solve_all(again, lambda matrices: None)


def _solve_all(jobs: list[Job], tick: Callable[[int], None]) -> dict[str, Solved]:
    pieces: dict[str, list[QTensor]] = {job.path: [] for job in jobs}
    rows: dict[str, list[LayerReport]] = {job.path: [] for job in jobs}
    for spans, size in chunks(jobs):
        for span, q, reports in zip(spans, *_solve(spans, size), strict=True):
            pieces[span.job.path].append(q)
            rows[span.job.path] += reports
        tick(sum(span.size for span in spans))
    return {job.path: Solved(job.assemble(pieces.pop(job.path)), rows[job.path]) for job in jobs}


def _notes(stats: Statistics | None) -> dict[str, str]:
    notes: dict[str, list[str]] = {}
    for path, note in stats.notes if stats is not None else ():
        notes.setdefault(path, []).append(note)
    return {path: "; ".join(parts) for path, parts in notes.items()}


def plan(named: dict[str, Any], stats: Statistics | None, recipe) -> list[Job]:
    """The jobs of a recipe, checked."""
    taken = configs_of(named, stats, recipe)
    ranged: dict[int, InputStatistics] = {}
    jobs = [_job(path, named[path], config, stats, ranged) for path, config in taken.items()]
    for job in jobs:
        _check_statistics(job)
        for candidate in choose.candidates(job):
            _check(candidate)
    return jobs


def foreseen(named: dict[str, Any], types: Statistics, recipe: Any) -> list[Job]:
    """Jobs of a recipe before calibration, with types for statistics; not those whose config hangs on their values.

    Raises ValueError where shapes do not fit.
    """
    jobs = [
        Job(path, named[path], config, *_axes(types.products[path], named[path]), types.products[path].inputs)
        for path, config in configs_of(named, types, recipe).items()
        if path in types.products and choose.is_settled(config)
    ]
    for job in jobs:
        _check_shapes(job)
    return jobs


def configs_of(named: dict[str, Any], stats: Statistics | None, recipe: Any) -> dict[str, Any]:
    """The method config of each weight that a recipe takes. Raises ValueError where it takes none."""
    floats = {p: leaf for p, leaf in named.items() if not is_qtensor(leaf) and is_matrix(leaf)}
    if stats is not None:
        quantizable = {p for p in floats if p in stats.products}
        if isinstance(recipe, list | tuple):
            quantizable |= {p for p in floats if p in stats.lookups}
    else:
        quantizable = weights_by_name(floats, recipe)
    taken = resolve(recipe, named, quantizable)
    if not taken:
        raise ValueError("the recipe quantizes nothing: every rule that matches has None for its config")
    return taken


def weights_by_name(paths: Iterable[str], recipe: Any) -> set[str]:
    """Those of some matrices that are weights: by their names, or because a rule of the recipe names them."""
    patterns = [pattern for pattern, _ in rules_of(recipe)]
    return {p for p in paths if _named_as_weight(p) or any(p.rpartition("/")[2] in r for r in patterns)}


def _named_as_weight(path: str) -> bool:
    *modules, name = path.lower().split("/")
    return not any(word in name for word in NOT_WEIGHTS) and "norm" not in "".join(modules[-1:])


def _job(path: str, leaf, config, stats: Statistics | None, ranged: dict[int, InputStatistics]) -> Job:
    ndim = np.ndim(leaf)
    if stats is None:
        return Job(path, leaf, config, (-2,), (-1,), None)
    if path not in stats.products:  # an embedding: one scale, or row of groups, per row, and no inputs to round
        if config.needs_statistics:
            raise ValueError(
                f"'{path}' is only looked up, so there are no statistics for {name_of(config)}; give it jq.RTN, or "
                f"leave it out by a rule ({path!r}, None) in front"
            )
        config = dataclasses.replace(config, spec=dataclasses.replace(config.spec, activations=None))
        return Job(path, leaf, config, (-1,), tuple(range(-ndim, -1)), None)
    product = stats.products[path]
    inputs = product.inputs
    if config.spec.static_activations:  # weights that share their statistics go on sharing them
        if id(inputs) not in ranged:
            ranged[id(inputs)] = _with_ranges(path, inputs)
        inputs = ranged[id(inputs)]
    return Job(path, leaf, choose.settled(config, inputs), *_axes(product, leaf), inputs)


def _axes(product: ProductStatistics, leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a weight that are summed over, and those that stand in the result, negative."""
    return tuple(a - np.ndim(leaf) for a in product.contract), tuple(a - np.ndim(leaf) for a in product.out)


def _with_ranges(path: str, inputs: InputStatistics) -> InputStatistics:
    """The statistics, in which a matrix that saw no token has the widest range of its layer's others (or of all)."""
    seen = inputs.count[..., None] > 0
    if not jnp.any(seen):
        raise ValueError(f"'{path}': its input saw no calibration token, so it has no static range; use a dynamic one")
    lowest, highest, stacked = inputs.lowest, inputs.highest, tuple(range(inputs.lowest.ndim - 1))
    for axes in (stacked[-1:], stacked):  # both are 0 where no token was seen
        lowest = jnp.where(seen, lowest, jnp.min(lowest, axes, keepdims=True))
        highest = jnp.where(seen, highest, jnp.max(highest, axes, keepdims=True))
        seen = seen | jnp.any(seen, axis=axes, keepdims=True)
    return dataclasses.replace(inputs, lowest=lowest, highest=highest)


def _check_statistics(job: Job) -> None:
    if job.inputs is None and needs_statistics(job.config):
        name = name_of(job.config) + (" with static activations" if job.config.spec.static_activations else "")
        raise ValueError(f"'{job.path}': {name} needs calibration statistics; pass jq.calibrate(...) as `stats`")


def _check_shapes(job: Job) -> None:
    if job.inputs is not None and job.inputs.gram.shape != (*job.lead, job.shape[0], job.shape[0]):
        raise ValueError(
            f"'{job.path}': its statistics are for {job.inputs.gram.shape[-1]} inputs, the weight has {job.shape[0]}; "
            "calibrate with the tree that is to be quantized"
        )
    try:
        for step in getattr(job.config, "steps", [job.config]):
            step.spec.num_groups(job.shape[0])
    except ValueError as error:
        raise ValueError(f"'{job.path}': {error}") from None


def _check(job: Job) -> None:
    _check_statistics(job)
    _check_shapes(job)
    bad = int(count_not_finite(job.leaf))
    if bad:
        raise ValueError(
            f"'{job.path}': {bad} of its {job.leaf.size} entries are not finite; repair or exclude the weight"
        )


def _solve(spans: list[Span], size: int) -> tuple[list[QTensor], list[list[LayerReport]]]:
    start = time.perf_counter()
    parts = [span.matrices() for span in spans]
    count = sum(span.size for span in spans)
    if count < size:  # the last chunk runs in the same program as the others
        parts.append(jax.tree.map(lambda a: jnp.repeat(a[-1:], size - count, 0), parts[-1]))
    w, inputs, scale = jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if len(parts) > 1 else parts[0]
    del parts  # or they would stay in memory while the method runs
    config = spans[0].job.config
    q, facts = run(*split_bits(config), w, inputs, scale)
    q = jax.block_until_ready(packed(q, config))
    facts = meshes.fetched(facts)
    seconds = (time.perf_counter() - start) / count
    pieces, reports, first = [], [], 0
    for span in spans:
        pieces.append(q if span.size == size else take(q, first, span.size))
        places = range(span.size)
        reports.append(
            [_row(span.job, span.start + i, {k: v[first + i] for k, v in facts.items()}, seconds) for i in places]
        )
        first += span.size
    return pieces, reports


def _row(job: Job, at: int, facts: dict[str, Any], seconds: float) -> LayerReport:
    def number(key):
        return float(facts[key]) if key in facts and np.isfinite(facts[key]) else None

    tokens, dropped = number("tokens"), number("dropped")
    index = np.unravel_index(at, job.lead) if job.lead else ()
    scaling = {name: float(fact[index]) for name, fact in job.facts.items()}
    spec = job.config.spec
    return LayerReport(
        path=job.path,
        index=tuple(map(int, index)),
        shape=job.shape,
        method=name_of(job.config),
        bits=spec.bits,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        activations="none" if spec.activations is None else spec.activations.kind,
        tokens=None if tokens is None else int(tokens),
        dropped_rows=None if dropped is None else int(dropped),
        rtn_error=number("rtn_error"),
        error=number("error"),
        fallback=FALLBACKS[int(facts.get("fallback", Fallback.NONE))],
        info=scaling | {k.removeprefix("info/"): number(k) for k in facts if k.startswith("info/")},
        seconds=seconds,
    )


def _nbytes(tree) -> int:
    return sum(np.asarray(a).nbytes if not hasattr(a, "nbytes") else a.nbytes for a in jax.tree.leaves(tree))
