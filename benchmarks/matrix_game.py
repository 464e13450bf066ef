"""Matrix-Game-3.0: the transformer's part of a rollout, upstream's own pipeline against itself compiled.

    python benchmarks/matrix_game.py Matrix-Game/Matrix-Game-3                             # released size, on CUDA
    python benchmarks/matrix_game.py ... --size tiny --device cpu --clips 3       # whether it runs

Random weights: what is measured is time and memory, and the distance from upstream's result with the same weights, never quality.
Text encoder and VAE are stand-ins that cost nothing. Every way runs the rollout twice in one process; the first one, in
which it compiles, is told apart (of 2 clips where nothing compiles). Times are between a clip's first call of the model and the end of its last step.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import statistics
import sys
import time

import torch
import typer

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from matrix_game_3.upstream import Upstream, load, there_and_back  # noqa: E402

import li_compile  # noqa: E402
from profiling import profiled  # noqa: E402

SLOTS = {"context.policy": "slots", "cache.threshold": 0.45}
TILES = {"tiny": {"sparse.tile": (4, 2, 2), "sparse.block_size": 16}, "real": {"sparse.tile": (4, 8, 4), "sparse.block_size": 128}}
#: Name -> our options, None: upstream as it is, a string: a way of others.
WAYS = {"upstream, eager": None, "upstream, eager, TF32": "tf32", "upstream, int8 q k v o": "int8", "Inductor a block, self-attention in bf16": "inductor",
        "exact": {"preset": "exact"}, "exact, islands in bf16": {"preset": "exact", "exact.islands": "bf16"},
        "exact, islands in TF32": {"preset": "exact", "exact.islands": "tf32"},
        "context": {"preset": "context"} | SLOTS, "cache": {"preset": "cache"} | SLOTS,
        "all, islands in bf16": {"preset": "all", "exact.islands": "bf16"} | SLOTS}


def main(upstream: str, size: str = "real", device: str = "cuda", clips: int = 8, layers: int = 0, ways: str = "", kinds: str = "turn,walk",
         lowering: str = "inductor", profile: bool = False, out: str = "out/matrix_game.json") -> None:
    """ways: names of WAYS, separated by semicolons; empty: all that this device can do.

    profile: print the kernels of the first step of clip 1.
    """
    results = []
    with torch.no_grad(), load(upstream, device, pipeline=True) as code:
        wanted = [w for w in (ways.split(";") if ways else WAYS) if device == "cuda" or not isinstance(WAYS[w], str)]
        reference: dict[str, list[torch.Tensor]] = {}
        for name in wanted:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model = code.make(size, layers or None)
            compiles = isinstance(WAYS[name], dict) or WAYS[name] == "inductor"
            with way(code, model, WAYS[name], size, lowering) as (pipeline, latents, detach):
                for kind in kinds.split(","):
                    first, _ = rollout(code, pipeline, latents, kind, clips if compiles else 2, size)
                    if device == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    seconds, got = rollout(code, pipeline, latents, kind, clips, size)
                    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
                    reference.setdefault(kind, got)
                    error = statistics.fmean(float((a - b).norm() / b.norm()) for a, b in zip(got, reference[kind]))
                    stats = pipeline.rollout.session.stats() if isinstance(WAYS[name], dict) else {}
                    results.append({"way": name, "kind": kind, "seconds": sum(seconds), "first rollout": sum(first), "clips": seconds, "error": error,
                                    "calls": stats.get("calls"), "kept": [c["context_kept"] for c in stats.get("per_chunk", [])],
                                    "peak GiB": peak, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
                                    "breaks": sum(torch._dynamo.utils.counters["graph_break"].values())})
                    base = next(r["seconds"] for r in results if r["kind"] == kind)
                    print(f"{name:45s} {kind}: {sum(seconds):8.2f} s, {base / sum(seconds):5.2f}x, relative difference {error:.1e}, "
                          f"{stats.get('calls', 3 * clips)} calls, {peak or 0:.1f} GiB, {results[-1]['graphs']} graphs, {results[-1]['breaks']} breaks, first rollout {sum(first):.1f} s", flush=True)
                    if profile:
                        rollout(code, pipeline, latents, kind, 2, size, title=f"{name}, {kind}")
                detach()
            del model
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    path.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "size": size, "layers": layers, "results": results}, indent=1))


@contextlib.contextmanager
def way(code: Upstream, model: torch.nn.Module, options, size: str, lowering: str):
    """(pipeline, list of its clips' latents, what undoes the way) around a model."""
    pipeline, latents = code.rollout(model, size)
    if isinstance(options, dict):
        config = li_compile.Config.from_options(options | {"lowering": lowering} | TILES[size])
        compiled = li_compile.compile(pipeline, config)
        yield compiled, latents, compiled.detach
        return
    undo = lambda: None
    if options == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif options == "int8":
        code.model.convert_model_to_int8(model, target_layers=["q", "k", "v", "o"])
    elif options == "inductor":
        undo = inductor_by_block(model)
    try:
        yield pipeline, latents, undo
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def inductor_by_block(model: torch.nn.Module):
    """The peer: our preparation, which makes blocks traceable at all, each block through plain Inductor, the self-attention's products
    in bf16. Returns what undoes it."""
    from li_compile.patterns.families.matrix_game_3 import arguments, prepare
    from li_compile.patterns.preparation import Preparation

    done = Preparation()
    prepare(model, done)
    whole = model.forward
    for block in model.blocks:
        attend = type(block.self_attn).forward

        def in_half(x, *args, _own=block.self_attn, _attend=attend, **kwargs):
            with torch.autocast("cuda", enabled=False):
                return _attend(_own, x.to(torch.bfloat16), *args, **kwargs)

        done(block.self_attn, "forward", in_half)
        own = block.self_attn.o
        done(own, "forward", lambda x, _own=own: torch.nn.functional.linear(x.to(torch.bfloat16), _own.weight, _own.bias))
        block.forward = torch.compile(type(block).forward.__get__(block), dynamic=False)  # in the place of our region; undone as that is

    @functools.wraps(whole)
    def forward(*args, **kwargs):
        _, given, _ = arguments(model, args, kwargs)
        return whole(**given)

    model.forward = forward
    return done.undo


def rollout(code: Upstream, pipeline, latents: list, kind: str, clips: int, size: str, title: str = "") -> tuple[list[float], list[torch.Tensor]]:
    """(seconds of each clip's denoising, its latents). title: of a profile of clip 1's first call; "": none."""
    latents.clear()
    seconds, model = [], pipeline.model
    sync = torch.cuda.synchronize if code.device.type == "cuda" else lambda: None

    class Timed:
        """The model, its calls timed; the scheduler's few operations in between are in none of the ways."""

        def __call__(self, *args, **kwargs):
            sync()
            begun = time.perf_counter()
            once = functools.partial(model, *args, **kwargs)
            out = profiled(title, once, code.device.type) if title and len(seconds) == 3 else once()
            sync()
            seconds.append(time.perf_counter() - begun)
            return out

        def __getattr__(self, name):
            return getattr(model, name)

    pipeline.model = Timed()
    try:
        code.play(pipeline, there_and_back(kind, clips), size)
    finally:
        pipeline.model = model
    return [sum(seconds[i: i + 3]) for i in range(0, len(seconds), 3)], [x.float().cpu() for x in latents]


if __name__ == "__main__":
    typer.run(main)
