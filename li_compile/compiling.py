"""``li_compile.compile``: ``torch.compile`` with our backend, its options checked first, and a way back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from li_compile import handover
from li_compile.backend import light_interaction, reporting
from li_compile.config import Config
from li_compile.dispatch import warming
from li_compile.errors import ConfigError
from li_compile.patterns.preparation import arguments_of, prepare
from li_compile.patterns.recognise import family_of_model
from li_compile.pipeline import family_of
from li_compile.report import Report
from li_compile.rollout import CompiledPipeline, Rollout, family_for
from li_compile.session import Session


def with_family(config: Config, model: Any) -> Config:
    """The config, naming the family that a model's modules belong to if it names none and exactly one does.

    Raises ConfigError for an unknown family.
    """
    found = [family_of(config)] if config.family is not None else family_of_model(model)
    return dataclasses.replace(config, family=found[0].name) if len(found) == 1 else config


class Compiled:
    """A compiled function or module. Call it as the original; attributes are the original's.

    ``report()``: what was rewritten so far. ``detach()``: the original, as it was; what the family's
    preparation changed in it (``preparation.changes``) is changed back.
    """

    def __init__(self, original: Callable[..., Any], config: Config, keeps_caches: bool = False) -> None:
        """keeps_caches: keys and values of context that it returns go to calls of it alone, unchanged, as in a rollout of ours."""
        self.original, self.config, self._report = original, config, Report(config.to_options())
        family = family_of(config)
        self.preparation = prepare(original, family)
        self._arguments = arguments_of(original, family, config.context.enabled)
        # The function and not its name: looking that up would prepare what nobody could undo.
        self._run = torch.compile(original, backend=light_interaction, options=config.to_options())
        # A graph that serves all lengths of context cannot look at sparse.min_context: shorter ones have one of their own.
        self._dense = self._run
        if self._arguments is not None and config.sparse.enabled and config.sparse.min_context:
            dense = dataclasses.replace(config, sparse=dataclasses.replace(config.sparse, enabled=False))
            self._dense = torch.compile(original, backend=light_interaction, options=dense.to_options())
        # Encodings, and steps whose context is in tile order; all else finds it in the model's.
        self._handed_on, self._ordered = None, None
        if (keeps_caches and family is not None and family.handed_on is not None and self._arguments is not None
                and config.sparse.enabled and config.exact.enabled and config.exact.tile_order):
            self._handed_on = family.handed_on
            self._ordered = torch.compile(original, backend=functools.partial(light_interaction, ordered=True), options=config.to_options())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, order = self._run, None
        if self._ordered is not None and not self._pruned_by_plan():
            cached = self._handed_on(kwargs)
            order = handover.common_order(cached)
            if not cached or order is not None and order.tile == self.config.sparse.tile:
                run = self._ordered
        if run is self._run:
            order, (args, kwargs) = None, handover.in_model_order((args, kwargs))
        if self._arguments is not None:
            given = self._arguments(args, kwargs)
            if given is None:
                return self.original(*args, **kwargs)
            args, kwargs, frames = given
            if frames is not None and frames < self.config.sparse.min_context:
                run = self._dense
        with reporting(self._report), handover.handing(order):
            return run(*args, **kwargs)

    def _pruned_by_plan(self) -> bool:
        """Whether a chunk is open whose plan may drop frames of a cache, which are to be found where the model has them."""
        session = Session.current()
        return self.config.context.enabled and session is not None and session.scope is not None

    def __getattr__(self, name: str) -> Any:
        own = ("original", "config", "preparation", "_arguments", "_run", "_dense", "_ordered", "_handed_on", "_report")
        if name in own:  # not set yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.original, name)

    def warm_up(self, *args: Any, **kwargs: Any) -> Report:
        """Compile ahead of the first chunk: every variant that a plan can choose for these inputs, or for any context that is
        shorter than theirs. Runs the function once. What was compiled stays in PyTorch's caches for the next process.

        args, kwargs: inputs as of a late chunk, with as much context as there will be. Returns the report; ``seconds`` of its
        variants is what each took. Variants for inputs of other shapes are compiled when they come.
        """
        with warming():
            self(*args, **kwargs)
        return self.report()

    def report(self) -> Report:
        return self._report

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
        return CompiledPipeline(model, known, Rollout(config, lambda module: Compiled(module, config, keeps_caches=True)))
    if not callable(model) or isinstance(model, type):
        raise ConfigError(f"{type(model).__name__} is neither a module nor a function; give its transformer, or a "
                          "function that denoises a chunk")
    return Compiled(model, with_family(config, model))
