"""Constants of a condition's branches become its operands.

Tables that an operator needs are constants of the trace. torch.export lifts those of a graph and leaves those of a branch where they are, and
neither a saved program nor Torch-TensorRT takes them there (2.11 to 2.14). What is computed from nothing, such as the frequencies of RoPE, is
folded in a graph, but not in a branch.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from li_compile.passes.invariants import stays
from li_compile.patterns.effects import written
from li_compile.patterns.graph import ancestors, placeholders, value

COND = torch.ops.higher_order.cond
NAME = "branch_constant_{}"


def held(branch: GraphModule) -> list[Node]:
    """The nodes of a branch that are constants of it."""
    return [n for n in branch.graph.find_nodes(op="get_attr") if isinstance(getattr(branch, n.target), torch.Tensor)]


def in_branches(module: GraphModule) -> bool:
    return any(held(b) for _, b in module.named_children() if isinstance(b, GraphModule))


def lift(module: GraphModule) -> None:
    """Do it to every condition of a graph, in place; the constants become buffers of the graph."""
    buffers: dict[tuple, str] = {}
    for node in module.graph.find_nodes(op="call_function", target=COND):
        predicate, *names, operands = node.args
        branches = [getattr(module, n.target) for n in names]
        given: dict[str, list[Node]] = {}  # a constant -> the input of each branch; an operand must not be given twice
        for i, branch in enumerate(branches):
            for constant in held(branch):
                tensor = getattr(branch, constant.target)
                name = buffers.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), NAME.format(len(buffers)))
                if not hasattr(module, name):
                    module.register_buffer(name, tensor)
                if name not in given:
                    with module.graph.inserting_before(node):
                        operands = (*operands, module.graph.get_attr(name))
                    given[name] = [_input(b, name) for b in branches]
                constant.replace_all_uses_with(given[name][i])
                branch.graph.erase_node(constant)
                if not any(n.target == constant.target for n in held(branch)):
                    delattr(branch, constant.target)
        node.args = (predicate, *names, operands)
        for branch in branches:
            branch.recompile()
    module.recompile()


def hoist(module: GraphModule) -> None:
    """Compute before a condition, in place, what its branches compute from no input: there Torch-TensorRT folds it. In a branch it
    would compute it anew, and otherwise: it divides an integer tensor by a number as integers (2.11)."""
    for node in module.graph.find_nodes(op="call_function", target=COND):
        predicate, *names, operands = node.args
        branches = [getattr(module, n.target) for n in names]
        for branch in branches:
            fixed, made = _fixed(branch), {}
            with module.graph.inserting_before(node):
                for x in fixed:
                    made[x] = module.graph.node_copy(x, made.__getitem__)
            for x in [x for x in fixed if any(u not in made for u in x.users)]:
                with module.graph.inserting_before(node):  # of its own: two operands must not share memory, as parts of one table would
                    own = module.graph.call_function(torch.ops.aten.clone.default, (made[x],))
                own.meta = dict(x.meta)
                operands = (*operands, own)
                inside = {b: _input(b, f"hoisted_{len(operands)}") for b in branches}
                for given in inside.values():
                    given.meta = dict(x.meta)
                x.replace_all_uses_with(inside[branch], delete_user_cb=lambda u: u not in made)
            for x in reversed(fixed):
                branch.graph.erase_node(x)
        node.args = (predicate, *names, operands)
        for branch in branches:
            branch.recompile()
    module.recompile()


def _fixed(branch: GraphModule) -> list[Node]:
    """The nodes of a branch that depend on no input, in order; values that are several are read one by one. Without those that make what the
    branch returns: it must not return an operand."""
    changing, fixed = written(branch.graph), {}
    for n in branch.graph.nodes:
        if isinstance(value(n), (torch.Tensor, list, tuple)) and stays(n, changing) and all(x in fixed for x in n.all_input_nodes):
            fixed[n] = None
    (output,) = branch.graph.find_nodes(op="output")
    returned, kept = set(ancestors([x for x in output.all_input_nodes if x in fixed])), {}
    for n in fixed:
        if n not in returned and all(x in kept for x in n.all_input_nodes):
            kept[n] = None
    return list(kept)


def _input(branch: GraphModule, name: str) -> Node:
    with branch.graph.inserting_after(placeholders(branch.graph)[-1]):
        return branch.graph.placeholder(name)
