"""Which family a model or graph belongs to, and which of its groups an attention does."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from .graph import subgraphs
from .registry import Family, families


def qualified(cls) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def recognised(classes: Iterable[str]) -> list[Family]:
    """The families one of whose modules is among these classes, and all that they require."""
    classes = set(classes)
    return [f for f in families().values() if classes.intersection(f.modules) and classes.issuperset(f.requires)]


FRAME = "li_frame"  # in a graph's meta: the classes of the modules that the traced function was handed, which no node names


def family_of_graph(module: GraphModule) -> list[Family]:
    """The families that the modules a graph was traced through belong to; several are an ambiguity."""
    graphs = (module, *subgraphs(module).values())
    inside = (qualified(cls) for m in graphs for n in m.graph.nodes for _, cls in (n.meta.get("nn_module_stack") or {}).values())
    return recognised([*module.meta.get(FRAME, ()), *inside])


def family_of_model(model) -> list[Family]:
    """The families that a module, or the modules that a function closes over, belong to."""
    return recognised(qualified(type(m)) for root in roots(model) for m in root.modules())


def family_of_pipeline(pipeline) -> list[Family]:
    """The families that know a pipeline's class or one that it derives from."""
    classes = {qualified(cls) for cls in type(pipeline).__mro__}
    return [f for f in families().values() if classes.intersection(f.pipelines)]


def roots(model) -> list[torch.nn.Module]:
    """The modules at hand in a module, a bound method, or a function's closure."""
    if isinstance(model, torch.nn.Module):
        return [model]
    held = [c.cell_contents for c in getattr(model, "__closure__", None) or ()]
    return [m for m in (*held, getattr(model, "__self__", None), *vars(model).values()) if isinstance(m, torch.nn.Module)] \
        if hasattr(model, "__dict__") else []


def path_of(node: Node) -> str:
    """The path of the module that a node was traced in, as "blocks.3.attention"."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", stack[-1][0]) if stack else ""


def group_of(node: Node, family: Family) -> str | None:
    """The first of a family's groups that a node's module path belongs to."""
    return next((name for name, part in family.groups.items() if fnmatch.fnmatch(path_of(node), f"*{part}*")), None)
