"""What an exported graph is called with: the arguments of a call as the model's family hands them to the compiled model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from li_compile.compiling import with_family
from li_compile.config import Config
from li_compile.errors import ExportError
from li_compile.patterns.preparation import arguments_of
from li_compile.pipeline import family_of


def family_inputs(model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None,
                  config: Config | None = None) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) with which an artifact of this model is called for this call of the model: what ``Family.arguments`` makes of
    them, as it does at every call of the compiled model. The same where no family has such a hook.

    config: as for :func:`~li_compile.export`. Raises ExportError where the family has the call run as it is, outside of all graphs.
    """
    config = with_family(Config() if config is None else config, model)
    family = family_of(config)
    given = arguments_of(model, family, config.context.enabled)
    if given is None:
        return tuple(args), dict(kwargs or {})
    made = given(tuple(args), dict(kwargs or {}))
    if made is None:
        raise ExportError(f"family {family.name} leaves this call of {type(model).__name__} uncompiled, so that there is no graph of it; run it in "
                          "PyTorch, and export the other calls")
    return tuple(made[0]), dict(made[1])
