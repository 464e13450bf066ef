"""All registered spellings in a graph, and what is wrong with them: ambiguous, of other shapes, or not there at all."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule, Node

from .attention_torch import read_flex, read_masked
from .graph import Miss, source_line, subgraphs
from .registry import Family, patterns
from .spelling import Spelling, disagreement, refuse

FIRED = "li_pattern"  # meta of a node that a spelling was rewritten to: the pattern's name


@dataclasses.dataclass
class Found:
    """spellings: region ("" for the graph itself) -> what can be rewritten. misses: calls that no canonical form equals.
    wrong: what a pattern does that it must not, an error under ``strict``."""

    spellings: dict[str, list[Spelling]] = dataclasses.field(default_factory=dict)
    misses: list[Miss] = dataclasses.field(default_factory=list)
    wrong: list[Miss] = dataclasses.field(default_factory=list)


def find_spellings(module: GraphModule, family: Family | None = None) -> Found:
    """Read every node of a graph and its regions with every registered pattern. A pattern that the family names wins over
    one that it does not."""
    found, registered = Found(), [p for p in patterns() if p.read is not None]
    for region, graph_module in {"": module, **subgraphs(module)}.items():
        read: list[Spelling] = []
        for node in graph_module.graph.nodes:
            if not node.op.startswith("call"):
                continue
            given = [read_flex(node), read_masked(node), *(p.read(node) for p in registered)]
            given = [g for g in given if g is not None]
            if family is not None and len(given) > 1:
                given = [g for g in given if isinstance(g, Spelling) and g.pattern in family.attention] or given
            found.misses += [g for g in given if isinstance(g, Miss)]
            read += [g for g in given if isinstance(g, Spelling)]
        found.spellings[region] = _checked(read, found)
    return found


def _checked(read: list[Spelling], found: Found) -> list[Spelling]:
    """Of the spellings of one graph those that stand alone and keep shapes; the others are noted as wrong."""
    owner: dict[Node, list[Spelling]] = {}
    for spelling in read:
        for node in spelling.nodes:
            owner.setdefault(node, []).append(spelling)
    good = []
    for spelling in read:
        rivals = [s for n in spelling.nodes for s in owner[n] if s is not spelling]
        if rivals:
            names = " and ".join(dict.fromkeys(repr(s.pattern) for s in (spelling, *rivals)))
            found.wrong.append(refuse(spelling.kind, spelling.anchor, spelling.pattern, f"it fires twice on one node ({names}); name one in the "
                                      "family's attention=, or register one only"))
        elif (why := disagreement(spelling)) is not None:
            found.wrong.append(refuse(spelling.kind, spelling.anchor, spelling.pattern, why))
        else:
            good.append(spelling)
    return good


def fired(module: GraphModule) -> dict[str, int]:
    """Pattern -> how many nodes of a graph and its regions it was rewritten to."""
    counts: dict[str, int] = {}
    for graph_module in (module, *subgraphs(module).values()):
        for node in graph_module.graph.nodes:
            if FIRED in node.meta:
                counts[node.meta[FIRED]] = counts.get(node.meta[FIRED], 0) + 1
    return counts


def never_fired(module: GraphModule, family: Family) -> list[Miss]:
    """The family's patterns that fired nowhere in a respelled graph, with the node that came nearest."""
    counts, known = fired(module), {p.name: p for p in patterns("attention")}
    misses = []
    for name in family.attention:
        if counts.get(name):
            continue
        if name not in known:
            misses.append(Miss("attention", "graph", f"family {family.name!r} names the pattern {name!r}, which nobody has registered"))
            continue
        node, why = _nearest(module, known[name])
        misses.append(Miss("attention", node.name if node is not None else "graph",
                           f"pattern {name!r} of family {family.name!r} fires nowhere in this graph; {why}",
                           source_line(node) if node is not None else ""))
    return misses


def _nearest(module: GraphModule, pattern) -> tuple[Node | None, str]:
    """The node that an example matched furthest, and where it did not."""
    example, best = getattr(pattern.read, "example", None), (0, None, "nothing in it comes near")
    for graph_module in (module, *subgraphs(module).values()):
        for node in graph_module.graph.nodes:
            if not node.op.startswith("call"):
                continue
            if isinstance(miss := pattern.read(node) if example is None else None, Miss):
                return node, miss.reason
            if example is not None:
                match = example.match(node)
                if match.at is not None and match.at is not node and match.depth > best[0]:
                    best = (match.depth, match.at, f"nearest: {match.reason}")
    return best[1], best[2]
