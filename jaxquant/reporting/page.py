"""The report as one HTML file, which needs no other and runs no script.

What it shows comes from files that may be hostile: names of directories, tokens, messages about them. The template
escapes all of it, letters that are not to be seen are spelled out, and the page's content security policy forbids
scripts and everything that would have to be fetched.
"""

import math
import os
from typing import Any

import jinja2
import markupsafe

from jaxquant.checkpoints.directory import check_writable, write_whole
from jaxquant.reporting import figures
from jaxquant.reporting.collect import Findings

_SPACE = {"\n", "\t"}


def write(findings: Findings, path: str | os.PathLike) -> None:
    """Writes the report into a file, which has all of it or is what it was before.

    Raises:
      OSError: the file cannot be written.
    """
    write_whole(check_writable(path), render(findings))


def render(findings: Findings) -> str:
    """The page."""
    rows = findings.all_rows
    return (
        _environment()
        .get_template("page.html")
        .render(
            f=findings,
            rows=rows,
            bars=figures.size_bars(rows),
            scatter=figures.perplexity_plot(rows),
            maps=figures.heat_maps(rows, findings.num_layers),
            ranges=figures.range_plots(findings.ranges, findings.num_layers),
            hottest=figures.hottest(rows),
            figures=figures,
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxquant.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "heat": _heat, "number": _number}
    return environment


def _visible(value: Any) -> Any:
    """A value as it is shown: of a text, letters that cannot be printed as "\\x00" or "\\u202e"."""
    if not isinstance(value, str) or isinstance(value, markupsafe.Markup):
        return value
    return "".join(c if c.isprintable() or c in _SPACE else c.encode("unicode_escape").decode() for c in value)


def _number(value: float | None, form: str) -> str:
    """A number in a format, or a dash where there is none."""
    if value == math.inf:
        return "∞"
    return "–" if value is None or math.isnan(value) else format(value, form)


def _percent(value: float) -> str:
    """A share in percent, with two digits, without an exponent."""
    text = f"{100 * value:.2g}"
    return f"{float(text):.8f}".rstrip("0").rstrip(".") if "e" in text else text


def _heat(kl: float | None, hottest: float) -> str:
    """How hot the background of a token is, in percent of the full colour; small divergences show, too."""
    return "0" if kl is None else f"{100 * math.sqrt(min(1.0, max(kl, 0.0) / hottest)):.0f}"
