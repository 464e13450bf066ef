"""What becomes of our operators in an artifact: kept as they are, written out in ATen operators (dense, where their sparsity cannot be; or around
a plugin), or named for another runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from li_compile.errors import ExportError
from li_compile.exporting.targets.onnx import in_domain
from li_compile.kernels import expected_provider
from li_compile.kernels.inlined import INLINED, why_not_inlined
from li_compile.kernels.native import NATIVE, gathered_share, why_not_native
from li_compile.kernels.plan import CURRENT, make_plan
from li_compile.kernels.plugin import PLUGIN, why_not_plugin
from li_compile.patterns.graph import value

CHOICES = ("auto", "compiled", "native", "plugin", "segment")
GATHER_MOST = 8.0  # times the keys and values' own bytes that gathering blocks may write

#: Target -> what "auto" tries, in order. operator: called as it is; dense: written out with nothing left out; domain: a node of the ONNX
#: domain li_compile; compiled: our Triton kernels become a part of the package; plugin: written out around one operator, whose kernel an engine
#: holds (experimental, and so taken only where it is asked for).
AUTO = {"exported_program": ("operator",), "aot_inductor": ("compiled", "operator"), "onnx": ("native", "dense", "domain"), "tensorrt": ("native", "segment")}
ASKED = {
    "exported_program": {"native": ("native", "operator"), "segment": ("operator",)},
    "aot_inductor": {"compiled": ("compiled", "operator"), "native": ("native", "operator"), "segment": ("operator",)},
    "onnx": {"native": ("native", "dense", "domain"), "plugin": ("domain",)},
    "tensorrt": {"native": ("native", "segment"), "plugin": ("plugin", "native", "segment"), "segment": ("segment",)},
}
#: The settings of our operators under which nothing is left out.
EVERYTHING = {"topk_ratio": 1.0, "prefill_ratio": 1.0, "head_ratios": [], "summary": False}
NEEDED = {
    "operator": "li_compile must be importable where it is loaded",
    "dense": "attention is dense here, in standard operators",
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

    Rows: operator, calls, lowering, why. Raises ExportError under strict where the artifact would need li_compile or a runtime's own
    implementation, or be dense.
    """
    def done(name: str, how: str, why: str, lower: Callable[[], None]) -> None:
        if strict and how in ("dense", "domain", "segment"):
            place = "an engine" if how == "segment" else "an ONNX graph of standard operators" + (" as it is" if how == "dense" else "")
            raise ExportError(f"{name} cannot be part of {place}: {why}. Export without strict, or switch off what needs it in the config")
        lower()

    rows = _each(graph, target, sparse, done)
    for module in _modules(graph):
        module.recompile()
    return rows


def lowered(graph: GraphModule, target: str, sparse: str = "auto") -> list[dict[str, Any]]:
    """The rows of :func:`lower_operators` for another target; the graph, of constant sizes, stays as it is."""
    return _each(graph, target, sparse, lambda *_: None)


def _each(graph: GraphModule, target: str, sparse: str, done: Callable[..., None]) -> list[dict[str, Any]]:
    rows: Counter = Counter()
    for module in _modules(graph):
        for node in list(module.graph.nodes):
            if (name := operator_of(node)) is not None:
                how, why, lower = _choose(node, name, AUTO[target] if sparse == "auto" else ASKED[target][sparse])
                done(name, how, why, lower)
                rows[name, how, why] += 1
    return [{"operator": name, "calls": calls, "lowering": how, "why": why} for (name, how, why), calls in rows.items()]


def _modules(graph: GraphModule) -> list[GraphModule]:
    return [graph, *(m for _, m in graph.named_children() if isinstance(m, GraphModule))]


def operator_of(node: Node) -> str | None:
    """Name of the operator of ours that a node calls."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name
    return name if name.startswith("li::") else None


def _choose(node: Node, name: str, ways: tuple[str, ...]) -> tuple[str, str, Callable[[], None]]:
    """(how, why, what does it to the node)"""
    arguments = dict(zip((a.name for a in node.target._schema.arguments), node.args)) | node.kwargs
    reasons = []

    def call(target, args, kwargs) -> None:
        node.target, node.args, node.kwargs = target, args, kwargs

    for way in ways:
        why = "; ".join([*reasons, NEEDED.get(way, "")])
        if way == "native":
            if (reason := why_not_native(name, arguments)) is None:
                share, how = _native(name, arguments)
                how = "; ".join([how, *reasons])
                return way, how, partial(call, NATIVE[name], node.args, {**node.kwargs, "share": share} if share > 1 else node.kwargs)
            if reason not in reasons:
                reasons.append(reason)
        elif way == "plugin":
            values = {a: map_arg(x, value) for a, x in arguments.items()}
            plan = _plan(name, arguments)
            if (reason := why_not_plugin(name, values, plan)) is None:
                how = f"our Triton kernel, for sm_80, reads at most {plan.pitch} of {plan.total} blocks; experimental: no engine with it was ever run"
                return way, how, partial(call, PLUGIN[name], node.args, node.kwargs)
            if name in PLUGIN:
                reasons.append(reason)
        elif way == "compiled":
            if (reason := why_not_inlined(name, {a: map_arg(x, value) for a, x in arguments.items()})) is None:
                return way, "our Triton kernels are compiled into the package", partial(call, INLINED[name], node.args, node.kwargs)
            reasons.append(f"not compiled in: {reason}")
        elif way == "dense":
            given = arguments | {a: x for a, x in EVERYTHING.items() if a in arguments}
            if why_not_native(name, given) is None:
                return way, why, partial(call, NATIVE[name], (), given)
        elif way == "domain":
            found = value(node)
            results = [(x.dtype, [int(s) for s in x.shape]) for x in (found if isinstance(found, (tuple, list)) else [found])]
            return way, why, partial(call, in_domain, (name, arguments, results), {})
        else:
            if way == "operator" and "q" in arguments and "block_size" in arguments:
                provider, reason = expected_provider(value(arguments["q"]), arguments["block_size"])
                why += f"; kernel {provider} ({reason})"
            return way, why, lambda: None
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
