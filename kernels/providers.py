"""Which implementation of an operator runs: a list of providers for each, in order of preference.

A provider says of given arguments either that it can take them or, in a sentence, why not. The first that can is used;
:func:`explain_provider` tells which one that is and why those before it were passed over. Tests and users override the
choice with ``with use_provider("triton"):`` or the environment variable ``LI_COMPILE_PROVIDER``.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Provider", "explain_provider", "providers", "register_provider", "select_provider", "use_provider"]

VARIABLE = "LI_COMPILE_PROVIDER"
_registry: dict[str, list[Provider]] = {}
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("li_compile_provider", default=None)


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator.

    Attributes:
        name: such as ``"reference"``, ``"cpu"``, ``"triton"``.
        run: takes the operator's arguments, returns its results.
        supports: takes the same arguments; None if it can run them, else a sentence that says why not.
    """

    name: str
    run: Callable
    supports: Callable[..., str | None]


def register_provider(operator: str, provider: Provider) -> None:
    """Append a provider, less preferred than those registered before it. A name can be registered once an operator."""
    known = _registry.setdefault(operator, [])
    if any(p.name == provider.name for p in known):
        raise ValueError(f"{operator} has a provider named {provider.name!r} already; choose another name.")
    known.append(provider)


def providers(operator: str) -> tuple[Provider, ...]:
    """The operator's providers, most preferred first."""
    if operator not in _registry:
        raise ValueError(f"No operator {operator!r} has providers; there are {sorted(_registry)}.")
    return tuple(_registry[operator])


@contextlib.contextmanager
def use_provider(name: str | None):
    """Within the context, run the provider of this name, or raise ValueError with its reason if it cannot run.

    It holds for every operator that has a provider of this name; the others choose as usual. None: choose as usual.
    """
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def select_provider(operator: str, *args) -> tuple[Provider, str]:
    """The provider that these arguments get, and the reason in words. Raises ValueError if an override cannot run."""
    known = providers(operator)
    wanted = _override.get() or os.environ.get(VARIABLE)
    for provider in known:
        if provider.name == wanted:
            if why_not := provider.supports(*args):
                raise ValueError(f"The provider {wanted!r} of {operator} was asked for, but cannot run: {why_not}")
            return provider, "asked for by use_provider or " + VARIABLE
    refusals = []
    for provider in known:
        why_not = provider.supports(*args)
        if why_not is None:
            return provider, "; ".join(refusals) or "preferred for these arguments"
        refusals.append(f"{provider.name}: {why_not}")
    raise ValueError(f"No provider of {operator} takes these arguments. " + "; ".join(refusals))


def explain_provider(operator: str, *args) -> tuple[str, str]:
    """``(name, reason)``: which provider would run for these arguments and why; runs nothing."""
    provider, reason = select_provider(operator, *args)
    return provider.name, reason
