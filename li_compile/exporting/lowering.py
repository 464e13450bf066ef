"""What becomes of our operators in an artifact: kept as they are, written out in ATen operators, or named for another runtime."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.fx import GraphModule, Node

from li_compile.errors import ExportError
from li_compile.exporting.targets.onnx import in_domain
from li_compile.kernels import expected_provider
from li_compile.kernels.native import NATIVE, gathered_share, why_not_native
from li_compile.kernels.plan import CURRENT, make_plan
from li_compile.patterns.graph import value

CHOICES = ("auto", "native", "plugin", "segment")
GATHER_MOST = 8.0  # times the keys and values' own bytes that gathering blocks may write

#: Target -> what "auto" tries, in order. operator: called as it is; domain: a node of the ONNX domain li_compile.
AUTO = {"exported_program": ("operator",), "aot_inductor": ("operator",), "onnx": ("native", "domain"), "tensorrt": ("native", "segment")}
ASKED = {
    "exported_program": {"native": ("native", "operator"), "segment": ("operator",)},
    "aot_inductor": {"native": ("native", "operator"), "segment": ("operator",)},
    "onnx": {"native": ("native", "domain"), "plugin": ("domain",)},
    "tensorrt": {"native": ("native", "segment"), "segment": ("segment",)},
}
NEEDED = {
    "operator": "li_compile must be importable where it is loaded",
    "domain": "the runtime needs an implementation of the domain li_compile",
    "segment": "runs in PyTorch between two engines, with li_compile",
}


def check_choice(target: str, sparse: str) -> None:
    """Raises ExportError for a way of lowering that there is not, or not for this target."""
    if sparse not in CHOICES:
        raise ExportError(f"sparse={sparse!r} is unknown; choose one of {', '.join(CHOICES)}")
    if sparse != "auto" and sparse not in ASKED[target]:
        raise ExportError(f"sparse={sparse!r} is not for target {target!r}, which takes auto, {', '.join(ASKED[target])}")


def lower_operators(graph: GraphModule, target: str, sparse: str, strict: bool) -> list[dict[str, Any]]:
    """Lower every call of an operator of ours, in place, and say how, one row for all calls alike.

    Rows: operator, calls, lowering, why. Raises ExportError under strict where the artifact would need li_compile or a plugin.
    """
    rows: Counter = Counter()
    for module in (graph, *(m for _, m in graph.named_children() if isinstance(m, GraphModule))):
        for node in list(module.graph.nodes):
            name = operator_of(node)
            if name is None:
                continue
            how, why = _lower(node, name, AUTO[target] if sparse == "auto" else ASKED[target][sparse])
            if strict and how in ("domain", "segment"):
                raise ExportError(f"{name} cannot be part of {'an ONNX graph of standard operators' if how == 'domain' else 'an engine'}: {why}. "
                                  "Export without strict, or switch off what needs it in the config")
            rows[name, how, why] += 1
        module.recompile()
    return [{"operator": name, "calls": calls, "lowering": how, "why": why} for (name, how, why), calls in rows.items()]


def operator_of(node: Node) -> str | None:
    """Name of the operator of ours that a node calls."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name
    return name if name.startswith("li::") else None


def _lower(node: Node, name: str, ways: tuple[str, ...]) -> tuple[str, str]:
    arguments = dict(zip((a.name for a in node.target._schema.arguments), node.args)) | node.kwargs
    reasons = []
    for way in ways:
        if way == "native":
            reason = why_not_native(name, arguments)
            if reason is None:
                share, how = _native(name, arguments)
                node.target = NATIVE[name]
                if share > 1:
                    node.kwargs = {**node.kwargs, "share": share}
                return "native", how
            reasons.append(reason)
            continue
        why = NEEDED[way]
        if way == "domain":
            found = value(node)
            results = [(x.dtype, [int(s) for s in x.shape]) for x in (found if isinstance(found, (tuple, list)) else [found])]
            node.target, node.args, node.kwargs = in_domain, (name, arguments, results), {}
        if way == "operator" and "q" in arguments and "block_size" in arguments:
            provider, reason = expected_provider(value(arguments["q"]), arguments["block_size"])
            why += f"; kernel {provider} ({reason})"
        return way, "; ".join([*reasons, why])
    raise ExportError(f"{name} cannot be exported: {'; '.join(reasons)}")


def _native(name: str, arguments: dict[str, Any]) -> tuple[int, str]:
    """(query blocks that choose together, in words)."""
    plan = _plan(name, arguments)
    if plan is None or plan.dense:
        return 1, "written out"
    share = next((g for g in range(1, plan.current_blocks + 1) if plan.current_blocks % g == 0 and gathered_share(plan, g) <= GATHER_MOST),
                 plan.current_blocks)
    how = f"gathered blocks, {gathered_share(plan, share):.1f} times the keys' and values' own bytes"
    if share == 1:
        return 1, how
    return share, f"{how}; {share} query blocks choose together, since each by itself would gather {gathered_share(plan):.1f} times"


def _plan(name: str, arguments: dict[str, Any]):
    if name not in ("li::sparse_attention", "li::sparse_decode"):
        return None
    a = arguments
    size = lambda node: value(node).shape[2]
    decode = name == "li::sparse_decode"
    lengths = [*a["lengths"], size(a["q"])] if decode else [size(k) for k in a["k"]]
    return make_plan(lengths, [*a["roles"], CURRENT] if decode else a["roles"], a["height"], a["width"], tuple(a["tile"]), a["block_size"],
                     a["topk_ratio"], 1.0 if decode else a["prefill_ratio"], tuple(a.get("head_ratios") or ()), a.get("protected", 0))
