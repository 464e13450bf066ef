"""What is known by name: model families and patterns, ours, the user's and those of installed packages.

A package that is installed is found by its entry points, with no import on the user's side::

    [project.entry-points."li_compile.families"]
    my_model = "my_package.family"            # a module that registers when it is imported, or a Family in one
"""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
import importlib.metadata
import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from functools import cache

from .attention_call import AttentionCall
from .example_spelling import attention_example, spelling_example

GROUP = "li_compile.families"
KINDS = ("attention", "context", "loop")


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family fixes: what is particular to a model and cannot be read from its graph.

    name: as in ``Config(family=...)``. description: one line for ``li-compile families``.

    modules: qualified names of module classes ("package.module.Class") by which the family is recognised where none is
        given: in a graph by the submodules that it was traced through, in ``li_compile.compile`` by the model's modules.
    requires: classes that must be there too, for a name that several models share.
    prepare: called as ``prepare(module, patch)`` by ``li_compile.compile`` and ``explain`` before tracing, on each module of
        the first of these classes, to hide what would break the graph; every change goes through ``patch(owner, attribute, new)``, so
        that it can be listed and undone.
    arguments: called as ``arguments(module, args, kwargs)`` at every call of a module of the first of these classes that
        ``li_compile.compile`` was given, outside of the graph: it returns (args, kwargs, frames) with what to call the compiled
        module with, so that what changes from call to call reaches the graph as tensors, and the number of latents of context that
        the call reads or encodes (None: unknown); or None where the module is to run as it is.
    holds: keyword argument of such a call -> dimension along which it holds context. Where context is pruned, and all of them are
        given, that size is one that may change; all other sizes are constants of a graph.
    handed_on: called as ``handed_on(given)`` with the keyword arguments of such a call, or with what one returned: the keys and values of
        context, ``[B, H, tokens, D]``, that an encoding returns and the steps of a chunk are given, in a list; an empty one where a call
        neither reads nor returns any. With it, in a rollout that ``attach`` took in hand, they may be kept in another order of tokens.
    pipelines: qualified names of pipeline classes, subclasses included, by which ``li_compile.compile(pipeline)`` knows the family.
    attach: called as ``attach(pipeline, patch, rollout)`` by ``li_compile.compile`` with such a pipeline, to put compiled models and
        planned chunks where the pipeline runs its rollout; changes go through ``patch``. rollout: ``config``; ``session``, one
        for all rollouts, to ``reset()`` at the start of each; ``compile(module)``, prepared for the family, undone with the rest;
        ``steps(plan, times)``, the steps of a chunk, some of which may be skipped; ``refuse(reason)``.
    roles: role -> argument name as it stands in the traced function, for ``history_w2c`` and ``current_w2c`` (camera poses)
        and ``positions`` (temporal RoPE indices of the context).
    grid: rows and columns of tokens in a latent frame, or None to read them from the graph.
    positions: of context frames that are kept, "keep" their temporal indices, "compact" them to the ones just before the
        current frames, or None: an input with indices is kept, what follows from the context's length is compacted.
    current: where history and new latents go through the model in one sequence, called as ``current(shapes)`` with the shape of each
        tensor among a graph's inputs, by the name it has there ("l_x_" of an argument x): it returns how many latents at the end of
        that sequence are new, which sparse attention always reads whole, or None where the inputs don't tell.
    padded: where preparation leaves out padding, called as ``padded(shapes)`` like ``current``: it returns the latents that the graph's
        sequence holds and those that the model's own code pads it to, or None. The report says what the difference would cost.
    never_padded: groups of attention whose modules the model's own code hands no padding.
    groups: name -> part of a module path (``fnmatch``) that says which attention belongs to it, for reports and opt-outs.
    attention: names of registered attention patterns that every graph of the family must hold.
    context: the one form of context to look for ("frames", "cache", "latents", "slices", or a registered pattern), or None: any.
    loop: name of the registered loop pattern to look for, or None: any.
    opt_out: groups of attention that are left alone, and "context" or "loop" to look for none.
    """

    name: str
    description: str = ""
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    grid: tuple[int, int] | None = None
    positions: str | None = None
    current: Callable | None = None
    padded: Callable | None = None
    never_padded: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    prepare: Callable | None = None
    arguments: Callable | None = None
    holds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    handed_on: Callable | None = None
    pipelines: tuple[str, ...] = ()
    attach: Callable | None = None
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    attention: tuple[str, ...] = ()
    context: str | None = None
    loop: str | None = None
    opt_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.positions not in (None, "keep", "compact"):
            raise ValueError(f"positions of family {self.name!r} is {self.positions!r}; it must be 'keep', 'compact' or None")
        for field in ("modules", "requires", "pipelines", "attention", "opt_out", "never_padded"):
            if isinstance(getattr(self, field), str):
                raise ValueError(f"{field} of family {self.name!r} is a string; it must be a tuple of strings")
        if self.pipelines and self.attach is None:
            raise ValueError(f"family {self.name!r} names pipelines, but not what to do with one; give attach")
        if unknown := set(self.never_padded) - set(self.groups):
            raise ValueError(f"family {self.name!r} says of {', '.join(sorted(unknown))} that it is never padded, which is none of its groups "
                             f"({', '.join(self.groups) or 'none'})")
        unknown = set(self.opt_out) - set(self.groups) - {"context", "loop"}
        if unknown:
            raise ValueError(f"family {self.name!r} opts out of {', '.join(sorted(unknown))}, which is neither 'context' nor 'loop' nor "
                             f"one of its groups ({', '.join(self.groups) or 'none'})")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A registered pattern. read(node): a Spelling, a Miss or None; find: of contexts ``find(module, sites, roles)``, of loops
    ``find(module)``, what the built-in matchers return. origin: who registered it. identity: changes with its meaning."""

    name: str
    kind: str
    read: Callable | None
    find: Callable | None
    origin: str
    identity: str


_FAMILIES: dict[str, Family] = {}
_PATTERNS: dict[tuple[str, str], Pattern] = {}
_ORIGINS: dict[str, str] = {}
_origin: contextvars.ContextVar[str | None] = contextvars.ContextVar("li_compile_origin", default=None)


def register_family(family: Family) -> Family:
    """Make a family known. Raises ValueError if the name is taken by a different one."""
    if _FAMILIES.get(family.name, family) != family:
        raise ValueError(f"a family named {family.name!r} is registered already ({_ORIGINS.get(family.name, '?')}); choose another name")
    _FAMILIES[family.name] = family
    _ORIGINS.setdefault(family.name, _who())
    return family


def register_attention(name: str, *, call: str | Callable | None = None, example: Callable | None = None, read: Callable | None = None,
                       layout: str = "BHSD", **rest) -> None:
    """Make a spelling of attention known, which is rewritten to ``scaled_dot_product_attention`` wherever that is exact.

    One of:
        call: an operator ("namespace::name"), a function that is traced as one ("package.module.function"), or the function.
            arguments: what an argument is for -> its name, where the usual ones (``patterns/attention_call.py``) do not fit.
            neutral: argument -> values with which it changes nothing. ignored: arguments that never do. result: index of the
            result where a tuple is returned.
        example: a function of q, k, v and numbers with defaults, traced and looked for. ``canonical``: what it says, of the
            same parameters; None: SDPA in ``layout``, with the parameter ``scale`` as its scale if there is one. Both are run
            on random numbers here and must agree.
        read: ``read(node)`` gives a ``Spelling``, a ``Miss`` with the reason, or None if the node is none.
    layout: of q, k, v and the result: B, H, S, D in any order with D last; without B, samples are packed along S.

    Raises ValueError for none or several of the three, a layout that is none, an example that is not what it is said to be,
    and for a name that is taken.
    """
    _one_of(name, call=call, example=example, read=read)
    if call is not None:
        read = AttentionCall(name, call, layout, **rest).read
    elif example is not None:
        read = attention_example(name, example, layout, **rest)
    elif rest:
        raise ValueError(f"pattern {name!r}: {', '.join(rest)} go with call or example, not with read")
    _register("attention", name, read, None, (call, example, layout, sorted(rest.items())) if call or example else read)


def register_context(name: str, *, find: Callable | None = None, example: Callable | None = None, canonical: Callable | None = None,
                     check: Callable | None = None) -> None:
    """Make a form of context, or a spelling of one, known.

    One of:
        find: ``find(module, sites, roles)`` gives a ``ContextConcat``, a ``Miss`` or None; asked before the built-in forms.
        example: a function of tensors, looked for and rewritten to ``canonical``, a function of the same parameters that says
            it with ``torch.cat``, slices and the like, such as an operator that appends to a cache. check: gives example
            inputs, on which both are run here and must agree.
    """
    _one_of(name, find=find, example=example)
    read = None if example is None else spelling_example(name, "context", example, canonical, check)
    _register("context", name, read, find, (example, canonical) if example else find)


def register_loop(name: str, *, find: Callable | None = None, example: Callable | None = None, canonical: Callable | None = None,
                  check: Callable | None = None) -> None:
    """Make a form of denoising loop, or a spelling of its update, known: as ``register_context``, with ``find(module)`` that
    gives a ``DenoisingLoop``, a ``Miss`` or None; an example may be an operator that does a scheduler's step."""
    _one_of(name, find=find, example=example)
    read = None if example is None else spelling_example(name, "loop", example, canonical, check)
    _register("loop", name, read, find, (example, canonical) if example else find)


def _one_of(name: str, **given) -> None:
    if sum(g is not None for g in given.values()) != 1:
        raise ValueError(f"pattern {name!r}: give one of {', '.join(given)}")


def _register(kind: str, name: str, read: Callable | None, find: Callable | None, means) -> None:
    pattern = Pattern(name, kind, read, find, _who(), _identity(means))
    before = _PATTERNS.get((kind, name))
    if before is not None and before.identity != pattern.identity:
        raise ValueError(f"a {kind} pattern named {name!r} is registered already ({before.origin}); choose another name")
    _PATTERNS[kind, name] = pattern


def _who() -> str:
    """Who registers: the entry point that is being loaded, or the module that called."""
    if (name := _origin.get()) is not None:
        return name
    package = __name__.rpartition(".")[0]
    for frame in inspect.stack()[2:]:
        module = frame.frame.f_globals.get("__name__", "?")
        if not module.startswith(f"{package}.") or module.startswith(f"{package}.families."):
            return "built in" if module.startswith(f"{package}.") else module
    return "?"


def _identity(means) -> str:
    """A text that says what a pattern or family does: of functions their code, which is the same in every process."""
    if isinstance(means, (list, tuple)):
        return f"({', '.join(map(_identity, means))})"
    if isinstance(means, Mapping):
        return _identity(sorted(means.items()))
    if isinstance(means, (types.FunctionType, types.MethodType)):
        code = means.__code__
        closed = tuple(c.cell_contents for c in means.__closure__ or ())
        constants = [getattr(c, "co_code", c) for c in code.co_consts]
        text = f"{code.co_code!r}{constants}{code.co_names}{means.__defaults__}{[repr(c) for c in closed if not callable(c)]}"
        return f"{means.__module__}.{means.__qualname__}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return getattr(means, "__qualname__", None) or repr(means)


def families() -> dict[str, Family]:
    """All registered families by name."""
    _load()
    return dict(_FAMILIES)


def patterns(kind: str | None = None) -> list[Pattern]:
    """All registered patterns, of one kind or of all, in the order in which they were registered."""
    _load()
    return [p for p in _PATTERNS.values() if kind in (None, p.kind)]


def origins() -> dict[str, str]:
    """Family -> who registered it: "built in", "package version (entry point)", or the module that did."""
    _load()
    return dict(_ORIGINS)


def identity() -> str:
    """A text that changes whenever a registered family or pattern does: part of a compiled graph's cache key."""
    _load()
    said = [_identity([(f.name, getattr(family, f.name)) for f in dataclasses.fields(family)]) for family in _FAMILIES.values()]
    return repr(sorted(said) + sorted(f"{p.kind} {p.name} {p.identity}" for p in _PATTERNS.values()))


@cache
def _load() -> None:
    """Register what comes with us and what installed packages offer, once."""
    from . import families as own  # noqa: F401  (registers)

    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "?"
        token = _origin.set(f"{package} ({entry.value})")
        try:
            loaded = entry.load()
            if isinstance(loaded, Family):
                register_family(loaded)
            elif callable(loaded):
                loaded()
        except Exception as error:  # a package that is broken must not take the others with it
            warnings.warn(f"model family {entry.name!r} of {package} cannot be loaded and is left out: "
                          f"{type(error).__name__}: {error}", stacklevel=2)
        finally:
            _origin.reset(token)


__all__ = ["Family", "Pattern", "families", "identity", "origins", "patterns", "register_attention", "register_context",
           "register_family", "register_loop"]
