"""HY-WorldPlay's rollout with random weights: upstream eager, Inductor, and ours, in one run; stages, memory, calls, distances.

    python benchmarks/worldplay.py UPSTREAM_TREE                        # tiny, on the CPU
    python benchmarks/worldplay.py UPSTREAM_TREE --size full            # 54 blocks in bf16 on a GPU: one of 80 GB
    python benchmarks/worldplay.py UPSTREAM_TREE --chunks 4 --variants eager exact --trajectory forward_back

Random weights show time, memory and identities, not quality. "Inductor" is preset "off": the family prepares the model, nothing is
rewritten. The first run compiles and is not counted. Distances are relative L2: of the latents at the end (each rollout follows its own path), and at equal inputs, those of the last
chunk with upstream's selection, of keys and values layer by layer and of the velocity step by step.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import sys
import time
import warnings

import torch

import li_compile

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

AUTHORS = {"context.policy": "authors", "cache.guard": None}
VARIANTS = {"eager": None, "inductor": {"preset": "off"}, **{p: {"preset": p} for p in ("exact", "context", "sparse", "cache", "all")}}
TINY_TILES = {"sparse.tile": (4, 2, 2), "sparse.block_size": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--blocks", type=int, help="other than the size has")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--trajectory", choices=("left_right", "forward_back"), default="left_right")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--warm-chunks", type=int, default=16, help="chunks of the first run, which compiles")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="options of ours over each variant's")
    parser.add_argument("--whole", action="store_true", help="run ours once more without waiting between the stages, and time the whole rollout")
    parser.add_argument("--no-equal-inputs", action="store_true", help="leave out the distances at equal inputs")
    args = parser.parse_args()
    os.environ["LI_COMPILE_HY_WORLDPLAY"] = args.tree
    torch.set_grad_enabled(False)

    setting = Setting(args)
    print(f"torch {torch.__version__}, {setting.where}, {args.size}, {len(setting.model.double_blocks)} blocks, {args.chunks} chunks, {args.trajectory}")
    print("| variant | selection s | context s | denoising s | DiT core s | of eager | whole s | first run s | peak GiB | reserved GiB | graphs | context latents | calls | distance |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    rows: dict[str, Row] = {}
    for name in args.variants:
        rows[name] = setting.measure(name)
        print(rows[name].line(name, rows.get("eager")), flush=True)
        if rows[name].waits:
            print(f"{name} waits for the device at: {rows[name].waits}", flush=True)
    if not args.no_equal_inputs:
        for name in ("sparse", "all"):
            if name in args.variants:
                print(setting.at_equal_inputs(name), flush=True)


class Row:
    def __init__(self, seconds, whole, first, peak, reserved, graphs, kept, calls, latents, waits) -> None:
        self.seconds, self.first, self.peak, self.graphs, self.kept, self.calls, self.latents = seconds, first, peak, graphs, kept, calls, latents
        self.whole, self.reserved, self.waits = whole, reserved, waits

    @property
    def core(self) -> float:
        return self.seconds["context"] + self.seconds["denoising"]

    def line(self, name: str, eager: Row | None) -> str:
        s = self.seconds
        number = lambda x: f"{x:.2f}" if x else ""
        cells = [name, *(f"{s[k]:.2f}" for k in ("selection", "context", "denoising")), f"{self.core:.2f}",
                 f"{eager.core / self.core:.2f}x" if eager else "", number(self.whole), f"{self.first:.0f}", number(self.peak), number(self.reserved),
                 str(self.graphs), str(self.kept), str(self.calls), f"{relative(self.latents, eager.latents):.1e}" if eager else ""]
        return f"| {' | '.join(cells)} |"


class Stages:
    """Wraps what a rollout calls, and adds up seconds and calls by stage. keep: also the inputs of the last chunk's calls, which holds its
    keys and values."""

    def __init__(self, sync) -> None:
        self.sync, self.keep = sync, False
        self.clear()

    def clear(self) -> None:
        self.seconds, self.calls, self.kept, self.last = collections.Counter(), collections.Counter(), 0, {}

    def timed(self, stage: str, call):
        self.sync()
        start = time.perf_counter()
        out = call()
        self.sync()
        self.seconds[stage] += time.perf_counter() - start
        self.calls[stage] += 1
        return out

    def selection(self, select):
        return lambda *a, **k: self.timed("selection", lambda: select(*a, **k))

    def model(self, run):
        def call(*args, **kwargs):
            stage = "text" if kwargs.get("ar_txt_inference") else "context" if kwargs["cache_vision"] else "denoising"
            self.kept += kwargs["hidden_states"].shape[2] if stage == "context" else 0
            if self.keep and stage == "context":
                self.last = {"context": kwargs, "steps": []}
            elif self.keep and stage == "denoising" and self.last:
                self.last["steps"].append(kwargs)
            return self.timed(stage, lambda: run(*args, **kwargs))

        return call


class Setting:
    def __init__(self, args) -> None:
        sys.path.append(str(ROOT))  # for examples.*; not for longer, as what stands there under a name of ours is no package
        import upstream

        sys.path.remove(str(ROOT))
        from models import worldplay_rollout as reduced
        from test_policy import forward_back, left_right

        self.args, self.upstream, full = args, upstream, args.size == "full"
        self.device = torch.device("cuda" if full else "cpu")
        if full and not torch.cuda.is_available():
            sys.exit("--size full needs a CUDA device")
        self.where = torch.cuda.get_device_name() if full else f"CPU, {torch.get_num_threads()} threads"
        depth = {"mm_double_blocks_depth": args.blocks} if args.blocks else {}
        self.model = upstream.transformer(self.device, torch.bfloat16 if full else torch.float32, **((upstream.FULL if full else {}) | depth))
        poses = (forward_back if args.trajectory == "forward_back" else left_right)()
        if full:
            reduced.TEXT, reduced.GLYPHS, reduced.PATCHES = 150, 0, 729
        given = reduced.inputs(args.chunks, poses, *((32, (30, 52), upstream.FULL_WIDTHS) if full else (8, (4, 4), upstream.WIDTHS)))
        put = lambda x: x.to(self.device) if isinstance(x, torch.Tensor) else {k: put(v) for k, v in x.items()} if isinstance(x, dict) else x
        keep = {"viewmats", "Ks", "action"}  # on the CPU, as upstream has them
        self.given = {k: v if k in keep else put(v) for k, v in given.items()} | {"device": self.device}
        self.stages = Stages(torch.cuda.synchronize if full else lambda: None)

    def config(self, name: str):
        tiles = TINY_TILES if self.args.size == "tiny" else {}
        return li_compile.Config.from_options(AUTHORS | tiles | {"lowering": self.args.lowering} | VARIANTS[name] | self.args.options)

    def attached(self, name: str):
        """(what to call, how to undo it) with the stages timed."""
        pipe = self.upstream.pipeline(self.model, self.args.chunks, autocast=self.args.size == "full")
        if VARIANTS[name] is None:
            module = self.upstream.load()[1]
            select, run = module.select_aligned_memory_frames, self.model.forward
            module.select_aligned_memory_frames, self.model.forward = self.stages.selection(select), self.stages.model(run)

            def undo():
                module.select_aligned_memory_frames = select
                del self.model.forward

            return pipe, undo
        fast = li_compile.compile(pipe, self.config(name))
        inner = pipe._ar_rollout_inner
        inner.model, inner.plan = self.stages.model(inner.model), self.stages.selection(inner.plan)
        return fast, fast.detach

    def rollout(self, pipe) -> torch.Tensor:
        pipe.scheduler.set_begin_index(None)
        pipe.scheduler.set_timesteps(pipe.num_inference_steps, device=self.device)
        return pipe.ar_rollout(**{**self.given, "latents": self.given["latents"].clone()})

    def measure(self, name: str) -> Row:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        cuda = self.device.type == "cuda"
        pipe, undo = self.attached(name)
        try:
            first, syncs = 0.0, ""
            if VARIANTS[name] is not None:  # compile, and look for copies that wait
                pipe.chunk_num, start = min(self.args.chunks, self.args.warm_chunks), time.perf_counter()
                self.rollout(pipe)
                self.stages.sync()
                first = time.perf_counter() - start
                syncs = self.waits(pipe) if cuda else ""
                pipe.chunk_num = self.args.chunks
            self.stages.clear()
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            latents = self.rollout(pipe)
            # What lies in the memory of a CUDA graph counts as reserved alone.
            peak, reserved = (f() / 2**30 if cuda else 0 for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
            stages, whole = (dict(self.stages.seconds), self.stages.kept, self.stages.calls["denoising"]), self.whole(pipe) if self.args.whole and VARIANTS[name] else 0
        finally:
            undo()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return Row(stages[0], whole, first, peak, reserved, graphs, *stages[1:], latents, syncs)

    def whole(self, pipe) -> float:
        """Seconds of a rollout from its first call to its last result, with nothing that waits in between."""
        sync, self.stages.sync = self.stages.sync, lambda: None
        sync()
        start = time.perf_counter()
        self.rollout(pipe)
        sync()
        self.stages.sync = sync
        return time.perf_counter() - start

    def waits(self, pipe) -> str:
        """Where a chunk's calls wait for the device, by PyTorch's own warnings; the stages' own waits are none."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.rollout(pipe)
            torch.cuda.set_sync_debug_mode("default")
        places = collections.Counter(f"{pathlib.Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message))
        return ", ".join(f"{place} {count}x" for place, count in places.most_common()) or "none"

    def at_equal_inputs(self, name: str) -> str:
        """Distances of one chunk's keys and values, layer by layer, and velocities, step by step, from the dense model's."""
        self.stages.clear()
        self.stages.keep = True
        pipe, undo = self.attached("eager")
        self.rollout(pipe)
        undo()
        self.stages.keep, inputs, self.stages.last = False, self.stages.last, {}
        torch._dynamo.reset()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            run = lambda model: [model(**inputs["context"]), *(model(**step)[0] for step in inputs["steps"])]
            dense = run(self.model)
            fast = li_compile.compile(self.model, self.config(name))
            got = run(fast)
        fast.detach()
        layers = [max(relative(a[k], b[k]) for k in ("k_vision", "v_vision")) for a, b in zip(got[0], dense[0])]
        steps = [relative(a, b) for a, b in zip(got[1:], dense[1:])]
        say = lambda xs: ", ".join(f"{x:.1e}" for x in xs)
        return f"{name} at equal inputs: context layers {say(layers)}; steps {say(steps)}"


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


if __name__ == "__main__":
    main()
