"""What a condition's branches compute from nothing is computed before it, and no branch returns an operand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from li_compile.exporting.branches import COND, hoist
from li_compile.patterns.graph import placeholders


class Gated(nn.Module):
    """One branch reads a table that is made of numbers alone, the other returns one."""

    def __init__(self, returned: str) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, x, reuse):
        def again(x):
            table = 10000 ** (-torch.arange(4, device=x.device) / 4)
            return x * table[:, None].mT + x.sin() * table.flip(0)[:1] + table.view(2, 2)[0, 1]

        def reused(x):
            ones = torch.ones(3, device=x.device)
            if self.returned == "view":
                return ones[:, None].expand(3, 4).contiguous()
            if self.returned == "also read":
                return (ones * 2).repeat(4, 1).mT.contiguous()
            return torch.full((3, 4), 2.0, device=x.device)

        return torch.cond(reuse, reused, again, (x,))


@pytest.mark.parametrize("returned", ["constant", "view", "also read"])
def test_tables_move_out_and_results_do_not_become_operands(returned):
    x = torch.randn(3, 4)
    model = Gated(returned)
    with torch.no_grad():
        module = torch.export.export(model, (x, torch.tensor(True)), strict=False).module()
        want = {flag: model(x, torch.tensor(flag)) for flag in (True, False)}
        hoist(module)
        for flag in (True, False):
            torch.testing.assert_close(module(x, torch.tensor(flag)), want[flag])
    (node,) = module.graph.find_nodes(op="call_function", target=COND)
    made = [n for n in node.args[3] if n.op == "call_function"]
    assert made and all(n.target is torch.ops.aten.clone.default for n in made), "operands that share no memory"
    for name in node.args[1:3]:
        branch = getattr(module, name.target)
        (output,) = branch.graph.find_nodes(op="output")
        assert not set(output.all_input_nodes) & set(placeholders(branch.graph))
        assert not [n for n in branch.graph.nodes if n.op == "call_function" and "arange" in str(n.target)]
