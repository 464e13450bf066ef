"""The private PyTorch API that the compiler uses, each use with its version and reason."""

from __future__ import annotations

import contextlib
import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass


class DigestPass(CustomGraphPass):
    """Does nothing but put our digest into the keys of Inductor's caches (2.11 to 2.14: the pass's ``uuid``).

    What was rewritten before Inductor is in the key anyway; the sources of our operators and lowerings are not.
    """

    def __init__(self, digest: str, inner: Any = None) -> None:
        """inner: a pass that the user asked for in the same place; it runs, and its uuid counts too."""
        self.digest, self.inner = digest, inner

    def __call__(self, graph: torch.fx.Graph) -> None:
        if self.inner is not None:
            self.inner(graph)

    def uuid(self) -> Any:
        if self.inner is None:
            return self.digest
        inner = self.inner.uuid() if hasattr(self.inner, "uuid") else None
        return None if inner is None else (self.digest, inner)  # None: Inductor does not cache


def inductor(module: torch.fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any], digest: str) -> Callable:
    """Compile with Inductor (``compile_fx``, private but used by every backend; 2.11 to 2.14)."""
    from torch._inductor.compile_fx import compile_fx

    place = "post_grad_custom_post_pass"
    with _schemas_once():
        return compile_fx(module, list(inputs), config_patches={**patches, place: DigestPass(digest, patches.get(place))})


@contextlib.contextmanager
def _schemas_once() -> Iterator[None]:
    """Let AOTAutograd trace a region once and not at every call, twice, to learn whether it writes to what it is handed, which all calls
    of one region with operands of the same kinds have in common (2.11 to 2.14: ``invoke_subgraph.gen_schema``)."""
    region, known = torch.ops.higher_order.invoke_subgraph, {}
    derive = region.gen_schema
    kind = lambda x: (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) and not _is_symbolic(x) else type(x)

    def gen_schema(subgraph, identifier, *operands):
        key = subgraph, identifier, tuple(map(kind, operands))
        if key not in known:
            known[key] = derive(subgraph, identifier, *operands)
        return known[key]

    region.gen_schema = gen_schema
    try:
        yield
    finally:
        del region.gen_schema


def _is_symbolic(x: torch.Tensor) -> bool:
    return any(isinstance(n, torch.SymInt) for n in (*x.shape, *x.stride()))


def as_traced(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Let AOTAutograd see which inputs of a copy or part of Dynamo's graph are weights, which copying makes it forget.

    Only these stay in place under CUDA graphs; all other inputs are copied at every call. Inputs have no source, as in
    the parts that Dynamo's DDPOptimizer makes (2.13, 2.14: ``dynamo_compile_id``, ``_param_name_to_source``,
    ``_dynamo_source``).
    """
    if "dynamo_compile_id" in module.meta:
        module._param_name_to_source = {}
        for node in module.graph.find_nodes(op="placeholder"):
            node._dynamo_source = None
    return module


def frame_modules() -> list[torch.nn.Module]:
    """The modules among the variables of the function that Dynamo traces, its ``self`` first (2.11 to 2.14:
    ``InstructionTranslator.current_tx().f_locals``): a graph's nodes name the modules inside of it, and not the one it is of."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        variables = InstructionTranslator.current_tx().f_locals
    except AttributeError:  # not called by Dynamo
        return []
    return [v for v in variables.values() if isinstance(v, torch.nn.Module)]


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor's options for ``torch.compile(mode=...)``; raises RuntimeError for an unknown mode."""
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        from li_compile.errors import ConfigError

        raise ConfigError(f"mode {mode!r} is unknown; choose one of {', '.join(sorted(known))}")
    return dict(known[mode])


def without_cuda_graph() -> int:
    """How many graphs Inductor has compiled without the CUDA graph that was asked for (a counter of 2.11 to 2.14)."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]


def fake_mode_of(inputs: Sequence[Any]):
    """The fake-tensor mode that made a graph's fake inputs; a new one if there is none among them."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    modes = [x.fake_mode for x in inputs if isinstance(x, FakeTensor)]
    return modes[0] if modes else FakeTensorMode(allow_non_fake_inputs=True)


def static_fakes(inputs: Sequence[Any], devices: Sequence[torch.device | None] | None = None, free: Sequence[int] = ()):
    """(mode, fake inputs) with constant sizes for tensors and numbers.

    devices: of meta tensors, what they stand for. free: positions of numbers that stay symbolic, so that one compilation
    serves all their values (``ShapeEnv.create_symbol``, private; 2.11 to 2.14).
    """
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)
    fakes = []
    for i, x in enumerate(inputs):
        if isinstance(x, torch.Tensor) and x.is_meta and devices is not None:
            with mode:
                fakes.append(torch.empty(x.shape, dtype=x.dtype, device=devices[i]))
        elif isinstance(x, torch.Tensor):
            fakes.append(mode.from_tensor(x, static_shapes=True))
        elif i in free:
            source = ConstantSource(f"li_number_{i}")
            symbol = env.create_symbol(int(x), source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None,
                                       do_not_specialize_zero_one=True)
            fakes.append(env.create_symintnode(symbol, hint=int(x), source=source))
        else:
            fakes.append(x)
    return mode, fakes


def marked_dims(x: Any) -> list[int]:
    """Dimensions of an input that its owner marked as dynamic (2.11 to 2.14: ``_dynamo_dynamic_indices`` and its weak form)."""
    if not isinstance(x, torch.Tensor):
        return []
    return sorted({*getattr(x, "_dynamo_dynamic_indices", ()), *getattr(x, "_dynamo_weak_dynamic_indices", ())})


def tensorrt_settings(version: str) -> dict[str, Any]:
    """Settings of ``torch_tensorrt.dynamo.compile``: the graph's own dtypes, and attention in standard operators. 2.11 wants the former said,
    later ones know nothing else; its attention layer takes no keys of another length than the queries', and none that was exported on the CPU."""
    return {"use_explicit_typing": True, "decompose_attention": True} if version.startswith("2.11") else {}


@contextlib.contextmanager
def spelled_out(module: torch.nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Let a module's ``forward`` name the keywords that it takes as ``**kwargs``: with these, torch.export 2.11 compares dynamic shapes with
    another structure of arguments than the one that it asks them for (2.14 does not)."""
    forward, own = module.forward, "forward" in vars(module)
    signature = inspect.signature(forward)
    gathered = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    named = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY) for k in kwargs if k not in signature.parameters]
    if not gathered or not named:
        yield
        return

    @functools.wraps(forward)
    def spelled(*args, **kwargs):
        return forward(*args, **kwargs)

    spelled.__signature__ = signature.replace(parameters=[p for p in signature.parameters.values() if p not in gathered] + named)
    module.forward = spelled
    try:
        yield
    finally:
        if own:
            module.forward = forward
        else:
            del module.forward


def forget_breaks() -> None:
    """Begin a new list of graph breaks (2.11 to 2.14: ``graph_break_reasons``)."""
    from torch._dynamo.utils import graph_break_reasons

    graph_break_reasons.clear()


def graph_breaks() -> list[tuple[str, list[traceback.FrameSummary]]]:
    """(reason, the user's stack with the innermost frame last) of the graph breaks since ``forget_breaks``."""
    from torch._dynamo.utils import graph_break_reasons

    return [(why.reason, list(why.user_stack)) for why in graph_break_reasons if why.graph_break]


def memory_of(x: torch.Tensor) -> tuple | None:
    """What a tensor is a view of, how, and how often that was written to; None if this is not counted.

    Equal for two tensors with the same contents in the same memory. Holds the memory weakly, and its address is not
    given to another while this lives (2.11 to 2.14: ``StorageWeakRef``; versions are counted except for inference tensors).
    """
    from torch.multiprocessing.reductions import StorageWeakRef

    if x.is_inference() or x.layout != torch.strided:
        return None
    return StorageWeakRef(x.untyped_storage()), x.storage_offset(), tuple(x.shape), x.stride(), x.dtype, x._version
