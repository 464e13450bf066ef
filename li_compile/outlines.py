"""The outline of a graph: its modules as a tree, equal ones folded, with the operators that matter and their cost."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from torch.fx import GraphModule, Node

from li_compile.passes.cost import products
from li_compile.patterns.graph import REGION, SHAPE_ONLY, name_of

MOST = 4  # how many siblings in a row a repeated unit may have, such as [double block, single block] x 20


@dataclasses.dataclass
class Outline:
    """A module, region or the graph. times: how often this and the like follow one another; operators: of its own, by
    name; flops: of all times, children included."""

    name: str
    kind: str
    times: int = 1
    operators: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: int = 0
    children: list[Outline] = dataclasses.field(default_factory=list)

    def lines(self, depth: int = 0) -> list[str]:
        """The outline as indented text."""
        times = f"{self.times} x " if self.times > 1 else ""
        kind = f" ({self.kind})" if self.kind else ""
        work = f"  {self.flops / 1e9:.2f} GFLOP" if self.flops else ""
        own = ", ".join(f"{n} {name}" if n > 1 else name for name, n in self.operators.items())
        head = f"{'  ' * depth}{times}{self.name}{kind}{work}" + (f"  [{own}]" if own else "")
        return [head, *(line for child in self.children for line in child.lines(depth + 1))]


def outline(module: GraphModule) -> Outline:
    """The outline of a graph whose nodes carry example values."""
    return _outline(module, "graph", "", {})


def _outline(module: GraphModule, name: str, kind: str, made: dict[str, Outline]) -> Outline:
    root = Outline(name, kind)
    work = {p.node: p.operations for p in products(module)}
    open_path: list[tuple[str, Outline]] = []
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or name_of(node) in SHAPE_ONLY or name_of(node).startswith("_"):
            continue
        path = _path(node)
        same = 0
        while same < min(len(path), len(open_path)) and open_path[same][0] == path[same][0]:
            same += 1
        del open_path[same:]
        for key, label, cls in path[same:]:
            child = Outline(label, cls)
            (open_path[-1][1] if open_path else root).children.append(child)
            open_path.append((key, child))
        here = open_path[-1][1] if open_path else root
        if node.target is REGION:
            region = node.args[0].target
            if region not in made:
                made[region] = _outline(getattr(module, region), region, "region", made)
            here.children.append(_copy(made[region]))
        else:
            label = name_of(node)
            here.operators[label] = here.operators.get(label, 0) + 1
            here.flops += work.get(node, 0)
    _total(root)
    return _fold(root)


def _path(node: Node) -> list[tuple[str, str, str]]:
    """(key, label, class) of each module around a node, outermost first; each call of a module has a key of its own."""
    path = []
    for key, (name, cls) in (node.meta.get("nn_module_stack") or {}).items():
        label = re.sub(r"L\['(\w+)'\]|_modules|\['?|'?\]", lambda m: m.group(1) or ".", str(name))
        label = re.sub(r"\.+", ".", label).strip(".")
        path.append((str(key), label.removeprefix("self.") or "self", getattr(cls, "__name__", str(cls).rpartition(".")[2])))
    return path


def _copy(this: Outline) -> Outline:
    return dataclasses.replace(this, operators=dict(this.operators), children=[_copy(c) for c in this.children])


def _total(this: Outline) -> int:
    # A region below was made, and summed, by itself.
    this.flops += sum(child.flops if child.kind == "region" else _total(child) for child in this.children)
    return this.flops


def _signature(this: Outline) -> tuple:
    return (re.sub(r"\d+", "#", this.name), this.kind, this.times, tuple(sorted(this.operators.items())), this.flops,
            tuple(_signature(c) for c in this.children))


def _fold(this: Outline) -> Outline:
    children = [_fold(child) if child.kind != "region" else child for child in this.children]
    signs = [_signature(child) for child in children]
    folded, i = [], 0
    while i < len(children):
        unit, times = 1, 1
        for size in range(1, MOST + 1):
            n = 1
            while signs[i : i + size] == signs[i + n * size : i + (n + 1) * size] and len(signs) >= i + (n + 1) * size:
                n += 1
            if n > 1:
                unit, times = size, n
                break
        for j in range(i, i + unit):
            one, last = children[j], children[j + (times - 1) * unit]
            if times > 1:
                name = one.name if one.name == last.name else f"{one.name} … {last.name}"
                one = dataclasses.replace(one, name=name, times=one.times * times, flops=one.flops * times)
            folded.append(one)
        i += unit * times
    return dataclasses.replace(this, children=folded)


def operators(this: Outline) -> Counter[str]:
    """How often each operator runs, all children and times counted."""
    total = Counter({name: n * this.times for name, n in this.operators.items()})
    for child in this.children:
        total.update({name: n * this.times for name, n in operators(child).items()})
    return total
