"""What a value of an option may be: a rule checks it, brings it into its canonical type and says what is allowed."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

from li_compile.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Rule:
    allowed: str  # completes "must be ..."
    parse: Callable[[Any], Any]  # returns the value in its canonical type, raises ValueError if it is not allowed


def option(default: Any, rule: Rule) -> Any:
    """A dataclass field with a default and the rule that `validate` holds it to."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def accept(ok: bool, value: Any) -> Any:
    if not ok:
        raise ValueError
    return value


def integer(low: int, high: int = 1 << 20) -> Rule:
    def parse(value: Any) -> int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return int(accept(whole and low <= value <= high, value))

    return Rule(f"a whole number from {low} to {high}", parse)


def real(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    def parse(value: Any) -> float:
        number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        return float(accept(number and low <= value <= high and not (above and value == low), value))

    return Rule(f"a number in {'(' if above else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}", parse)


def several(*rules: Rule) -> Rule:
    def parse(value: Any) -> tuple:
        accept(isinstance(value, (tuple, list)) and len(value) == len(rules), value)
        return tuple(rule.parse(item) for rule, item in zip(rules, value, strict=True))

    return Rule("(" + ", ".join(rule.allowed for rule in rules) + ")", parse)


def listed(rule: Rule) -> Rule:
    def parse(value: Any) -> tuple:
        accept(isinstance(value, (tuple, list)) and len(value) > 0, value)
        return tuple(rule.parse(item) for item in value)

    return Rule(f"a tuple, each {rule.allowed}", parse)


def ascending(low: int, high: int = 1 << 20) -> Rule:
    def parse(value: Any) -> tuple[int, ...]:
        items = tuple(integer(low, high).parse(item) for item in accept(isinstance(value, (tuple, list)), value))
        return accept(items != () and all(a < b for a, b in zip(items, items[1:])), items)

    return Rule(f"ascending whole numbers from {low}", parse)


def one_of(*names: str) -> Rule:
    allowed = ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
    return Rule(allowed, lambda value: accept(isinstance(value, str) and value in names, value))


def optional(rule: Rule) -> Rule:
    return Rule(f"None or {rule.allowed}", lambda value: None if value is None else rule.parse(value))


FLAG = Rule("True or False", lambda value: accept(isinstance(value, bool), value))
RATIO = real(0, 1)
SHARE = real(0, 1, above=True)
RATIOS = listed(RATIO)
NAME = Rule("a name (str)", lambda value: accept(isinstance(value, str) and value != "", value))


def validate(instance: Any, prefix: str) -> None:
    """Check every ruled field of a frozen dataclass in place; errors call the option ``prefix + name``."""
    for field in dataclasses.fields(instance):
        rule: Rule | None = field.metadata.get("rule")
        if rule is None:
            continue
        value = getattr(instance, field.name)
        try:
            object.__setattr__(instance, field.name, rule.parse(value))
        except (ValueError, TypeError):
            raise ConfigError(f"option {prefix + field.name!r} is {value!r}; it must be {rule.allowed}") from None
