"""``li_compile.compile``: ``torch.compile`` with our backend, its options checked first, and a way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from li_compile.config import Config
from li_compile.errors import ConfigError
from li_compile.patterns.preparation import arguments, prepare
from li_compile.patterns.recognise import family_of_model
from li_compile.pipeline import family_of
from li_compile.rollout import CompiledPipeline, Rollout, family_for


def with_family(config: Config, model: Any) -> Config:
    """The config, naming the family that a model's modules belong to if it names none and exactly one does.

    Raises ConfigError for an unknown family.
    """
    found = [family_of(config)] if config.family is not None else family_of_model(model)
    return dataclasses.replace(config, family=found[0].name) if len(found) == 1 else config


class Compiled:
    """A compiled function or module. Call it as the original; attributes are the original's.

    ``report()``: what was rewritten so far in this thread. ``detach()``: the original, as it was; what the family's
    preparation changed in it (``preparation.changes``) is changed back.
    """

    def __init__(self, original: Callable[..., Any], config: Config) -> None:
        self.original, self.config = original, config
        self.family = family_of(config)
        self.preparation = prepare(original, self.family)
        self._run = torch.compile(original, backend="light_interaction", options=config.to_options())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = arguments(self.original, self.family, args, kwargs, self.config.context.enabled)
        return self._run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("original", "config", "family", "preparation", "_run"):  # not set yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.original, name)

    def report(self):
        from li_compile.backend import last_report

        return last_report()

    def detach(self) -> Callable[..., Any]:
        self.preparation.undo()
        return self.original


def compile(model: Any, config: Config | None = None, family: str | None = None) -> Compiled | CompiledPipeline:
    """Compile a module, a function or a pipeline for the options of ``config`` (None: all defaults, preset "all").

    For a module or function the same as ``torch.compile(model, backend="light_interaction", options=...)``, with the options
    checked at once and not at the first call. A pipeline is taken apart by the family that knows its class: its models are
    compiled, its chunks planned. family: name of a model family (``li-compile families``), over the config's; None: the one
    that the model's modules or the pipeline belong to, if any. Its preparation is run on the model.
    Raises ConfigError for what is none of these, for an unknown family and for a pipeline that no family knows.
    """
    config = Config() if config is None else config
    if family is not None:
        config = dataclasses.replace(config, family=family)
    known = family_for(model, config)
    if known is not None:
        config = dataclasses.replace(config, family=known.name)
        return CompiledPipeline(model, known, Rollout(config, lambda module: Compiled(module, config)))
    if not callable(model) or isinstance(model, type):
        raise ConfigError(f"{type(model).__name__} is neither a module nor a function; give its transformer, or a "
                          "function that denoises a chunk")
    return Compiled(model, with_family(config, model))
