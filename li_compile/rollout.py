"""A pipeline with a rollout of its own: the family that knows it puts compiled models and planned chunks inside."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from li_compile.config import Config
from li_compile.errors import ConfigError
from li_compile.patterns import registry
from li_compile.patterns.preparation import Preparation
from li_compile.patterns.recognise import family_of_pipeline
from li_compile.patterns.registry import Family
from li_compile.pipeline import family_of
from li_compile.policy import ChunkPlan
from li_compile.report import Report
from li_compile.scope import chunk_begins
from li_compile.session import Session
from li_compile.stepping import ChunkSteps

if TYPE_CHECKING:
    from li_compile.compiling import Compiled

_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial, type, torch.nn.Module)


class Rollout:
    """What a family's ``attach`` is given besides the pipeline.

    config: the options. session: the state of the rollout; the family resets it where one begins. ``compile(module)``: a
    compiled module, prepared for the family. All that was compiled is in ``compiled``. ``begin()``: to be called where a chunk
    begins that is no ``session.chunk``: what compiled models returned before may be overwritten. ``steps(plan, times)``: the
    denoising steps of a chunk, some of which may be skipped (li_compile/stepping.py). ``refuse(reason)`` raises ConfigError.
    """

    def __init__(self, config: Config, compile: Callable[[Any], Compiled]) -> None:
        self.config, self.session = config, Session(config)
        self.compiled: list[Compiled] = []
        self._compile = compile

    def compile(self, module: Any) -> Compiled:
        self.compiled.append(self._compile(module))
        return self.compiled[-1]

    def begin(self) -> None:
        chunk_begins(self.config)

    def steps(self, plan: ChunkPlan, times: Sequence[float], controls: Sequence[torch.Tensor] = ()) -> ChunkSteps:
        return ChunkSteps(self.session, self, plan, times, controls)

    def refuse(self, reason: str) -> None:
        raise ConfigError(f"family {self.config.family!r}: {reason}")


class CompiledPipeline:
    """A pipeline whose rollout is compiled. Call it as the original; attributes are the original's, also when they are set.

    ``rollout``: its session and compiled models. ``report()``: what was rewritten so far. ``detach()``: the
    original, with everything that was changed in it or in its modules (``preparation.changes``) as it was.
    """

    _OWN = ("original", "rollout", "preparation")

    def __init__(self, original: Any, family: Family, rollout: Rollout) -> None:
        self.original, self.rollout, self.preparation = original, rollout, Preparation()
        try:
            family.attach(original, self.preparation, rollout)
        except BaseException:
            self.detach()
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.__call__(*args, **kwargs)  # looked up on the object: a family may have changed it there

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:  # not set yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.original, name, value)

    def report(self) -> Report:
        reports = [compiled.report() for compiled in self.rollout.compiled]
        return Report(self.rollout.config.to_options(), [g for r in reports for g in r.graphs], prepared=self.preparation.changes
                      + [change for r in reports for change in r.prepared])

    def detach(self) -> Any:
        self.preparation.undo()
        for compiled in reversed(self.rollout.compiled):
            compiled.detach()
        return self.original


def family_for(thing: Any, config: Config) -> Family | None:
    """The family that takes a pipeline apart; None for what is no pipeline.

    Raises ConfigError for a pipeline that no family knows, that several do, or that the family named does not take, and for
    an unknown family.
    """
    modules = {} if isinstance(thing, _FUNCTIONS) else \
        {name: m for name, m in getattr(thing, "__dict__", {}).items() if isinstance(m, torch.nn.Module)}
    found = [] if isinstance(thing, _FUNCTIONS) else family_of_pipeline(thing)
    if config.family is not None and (modules or found):
        found = [f for f in (family_of(config),) if f.attach is not None]
    if len(found) == 1:
        return found[0]
    if not modules and not found:
        return None
    who = type(thing).__qualname__
    if found:
        raise ConfigError(f"families {' and '.join(f.name for f in found)} both know the pipeline {who}; say which with family=...")
    known = [f.name for f in registry.families().values() if f.attach is not None]
    said = f"family {config.family!r} says nothing about pipelines" if config.family is not None else "no family knows it"
    raise ConfigError(
        f"{who} looks like a pipeline (it holds {', '.join(modules)}), and {said}; pipelines are known to: "
        f"{', '.join(known) or 'none'}. Compile the model inside, pipe.{next(iter(modules))} = li_compile.compile(pipe.{next(iter(modules))}), "
        "or the method that denoises a chunk; or register a Family with pipelines=(...) and attach=...")
