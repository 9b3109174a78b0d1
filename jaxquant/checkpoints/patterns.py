"""Regular expressions that name modules, in the configurations of others: written, and matched with care."""

import re
from collections.abc import Mapping
from typing import Any

LONGEST = 128  # letters of a module's name


def pattern_of(module: str) -> str:
    """A pattern for the module and its like in all layers (and experts)."""
    parts = (r"\d+" if part.isdecimal() else re.escape(part) for part in module.split("."))
    return "^" + r"\.".join(parts) + "$"


def patterns_of(specs: Mapping[str, Any]) -> dict[str, str | None]:
    """For each module the pattern that it shares with its like; None if one of them has another spec."""
    found: dict[str, set[Any]] = {}
    for module, spec in specs.items():
        found.setdefault(pattern_of(module), set()).add(spec)
    return {module: p if len(found[p := pattern_of(module)]) == 1 else None for module in specs}


def matches(pattern: str, module: str, given: str) -> bool:
    """Whether a pattern matches from the start of a name, as `re.match`.

    Checkpoints come from anywhere, and a pattern could take for ever to match: only simple ones are tried, on names as
    long as models have.

    Raises:
      ValueError: it is too complex, or no regular expression; the message shows it as `given`.
    """
    repeats = sum(map(pattern.count, "*+?{"))
    repeats -= sum(map(pattern.count, ("(?:", "(?!", "(?=")))  # no repetitions
    if len(pattern) > 256 or repeats > 4 or pattern.count("|") > 12 or re.search(r"\)[*+?{]", pattern):
        raise ValueError(
            f"quantization_config: the target {given[:80]!r} is too complex; supported are up to 4 repetitions, "
            "none of them of a group, and 12 alternatives"
        )
    if len(module) > LONGEST:
        raise ValueError(f"quantization_config: {module[:80]!r} is a name of {len(module)} letters; no module has that")
    try:
        return re.match(pattern, module) is not None
    except (re.error, OverflowError) as error:
        raise ValueError(f"quantization_config: the target {given!r} is no regular expression ({error})") from error
