"""Which weight is quantized how: rules from path patterns to method configs."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxquant.methods.rtn import RTN

Recipe = Any  # a method config, or a sequence of (regular expression, method config or None)


def rules_of(recipe: Recipe) -> Sequence[tuple[str, Any]]:
    """The rules of a recipe; a bare config is one rule for every path.

    Raises:
      ValueError: the recipe is neither, or a pattern is no regular expression.
    """
    if not isinstance(recipe, list | tuple):
        if not hasattr(recipe, "quantize"):
            raise ValueError(
                f"recipe={recipe!r} is no method config; write for example jq.GPTQ(jq.int4(group_size=128))"
            )
        return [(".*", recipe)]
    for rule in recipe:
        if not (isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str)):
            raise ValueError(f"recipe rule {rule!r} is not a pair (regular expression, config or None)")
        if rule[1] is not None and not hasattr(rule[1], "quantize"):
            raise ValueError(f"recipe rule {rule[0]!r}: {rule[1]!r} is no method config and not None")
        try:
            re.compile(rule[0])
        except (re.error, OverflowError) as error:
            raise ValueError(f"recipe rule {rule[0]!r} is no regular expression: {error}") from None
    return recipe


def needs_statistics(config: Any) -> bool:
    """Whether a method config reads calibration statistics, itself or for the range of activations."""
    return config.needs_statistics or config.spec.static_activations


def name_of(config: Any) -> str:
    """The name of a method config for people; of a `Chain`, those of its steps."""
    steps = getattr(config, "steps", None)
    return type(config).__name__ if steps is None else "+".join(map(name_of, steps))


def unscaled(config: Any) -> Any:
    """What a method config that scales channels is without that: the last step of a `Chain`, else rounding."""
    steps = getattr(config, "steps", None)
    return RTN(config.spec, clip=getattr(config, "clip", None)) if steps is None else steps[-1]


def resolve(recipe: Recipe, paths: Iterable[str], quantizable: set[str]) -> dict[str, Any]:
    """The config of each weight that the recipe takes.

    Args:
      recipe: a method config, or rules `(pattern, config or None)`. A pattern must match the whole of a path
        "a/b/c"; the first rule that matches wins; None, or no rule at all, leaves the leaf as it is.
      paths: all paths of the parameter tree.
      quantizable: those that can be quantized; a rule with a config must be the first to match at least one of them,
        and a rule with None at least one of `paths`.

    Raises:
      ValueError: a rule takes nothing; the message says what there is.
    """
    rules = rules_of(recipe)
    taken: dict[str, Any] = {}
    used = [False] * len(rules)
    for path in paths:
        for i, (pattern, config) in enumerate(rules):
            if re.fullmatch(pattern, path):
                used[i] |= config is None or path in quantizable
                if config is not None and path in quantizable:
                    taken[path] = config
                break
    for (pattern, config), was_used in zip(rules, used, strict=True):
        if not was_used:
            what = "leaf" if config is None else "weight that can be quantized"
            some = ", ".join(sorted(quantizable)[:6]) or "none"
            raise ValueError(
                f"recipe rule {pattern!r} takes no {what} (patterns match whole paths, and the first match wins); "
                f"weights that can be quantized: {some}{', …' if len(quantizable) > 6 else ''}"
            )
    return taken
