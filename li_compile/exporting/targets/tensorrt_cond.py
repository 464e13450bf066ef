"""``torch.cond`` in a TensorRT engine: an IIfConditional, whose untaken branch is not run.

Torch-TensorRT has no converter for it (up to 2.14); where it gets one, ours is not registered.
"""

from __future__ import annotations

from typing import Any

import torch

COND = torch.ops.higher_order.cond


def register_cond() -> bool:
    """Make the converter known, once a process. Returns whether it is ours that is used."""
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS, dynamo_tensorrt_converter

    if COND in DYNAMO_CONVERTERS:
        return getattr(register_cond, "done", False)
    dynamo_tensorrt_converter(COND, supports_dynamic_shapes=True)(_convert)
    _let_branches_pass()
    register_cond.done = True
    return True


class _Branch(torch.fx.Interpreter):
    """Adds the layers of one branch to the network that its condition stands in."""

    def __init__(self, graph: torch.fx.GraphModule, context, name: str) -> None:
        super().__init__(graph)
        self.context, self.name, self.node = context, name, None

    def run_node(self, n: torch.fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target, args, kwargs) -> Any:
        from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS

        convert = DYNAMO_CONVERTERS[self.node][0]
        return convert(self.context, target, args, kwargs, f"{self.name}/{self.node.name}")


def _convert(ctx, target, args, kwargs, name: str) -> Any:
    from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor

    predicate, taken, otherwise, operands = args
    layer = ctx.net.add_if_conditional()
    layer.name = name
    layer.set_condition(predicate)
    given = [layer.add_input(get_trt_tensor(ctx, o, f"{name}_operand_{i}")).get_output(0) for i, o in enumerate(operands)]
    branches = [_Branch(graph, ctx, f"{name}/{which}").run(*given) for which, graph in (("true", taken), ("false", otherwise))]
    branches = [[get_trt_tensor(ctx, x, f"{name}_{i}_{j}") for j, x in enumerate(b if isinstance(b, (tuple, list)) else [b])]
                for i, b in enumerate(branches)]
    return tuple(layer.add_output(a, b).get_output(0) for a, b in zip(*branches))


def _let_branches_pass() -> None:
    """Torch-TensorRT takes every attribute of a graph for a tensor (2.11 to 2.14); those of a condition are its branches."""
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter

    run_node = TRTInterpreter.run_node

    def run(self, n: torch.fx.Node) -> Any:
        if n.op == "get_attr" and isinstance(held := self.fetch_attr(n.target), torch.fx.GraphModule):
            self.const_mapping[str(n)] = (), "graph"  # what its log says of the condition's operands
            return held
        return run_node(self, n)

    TRTInterpreter.run_node = run
