"""Single calls of HY-WorldPlay's transformer with random weights: upstream eager, Inductor, and ours, in one run, against their floor.

    python benchmarks/worldplay_calls.py UPSTREAM_TREE --size full --blocks 8 --context 12
    python benchmarks/worldplay_calls.py UPSTREAM_TREE --variants eager exact --profile

A denoising step of the first chunk, a context encoding and a denoising step that reads it. "Inductor" is preset "off": the family prepares
the model (upstream keeps its attention from the compiler), nothing is rewritten. Errors are relative L2 from the same weights in fp32. The
floor is attention as fast as the fastest dense kernel of PyTorch here, measured in this run, and the other products at ``--tflops``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import li_compile
from profiling import profiled
from worldplay import VARIANTS, Setting, relative

CALLS = ("first step", "context", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--blocks", type=int, help="other than the size has")
    parser.add_argument("--context", type=int, default=12, help="latents of context")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["eager", "inductor", "exact", "sparse"])
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--tflops", type=float, default=790, help="rate of the products other than attention in the floor")
    parser.add_argument("--profile", action="store_true", help="kernels by time")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="options of ours over each variant's")
    parser.add_argument("--no-reference", action="store_true", help="leave out fp32")
    args = parser.parse_args()
    args.chunks, args.trajectory = args.context // 4 + 1, "left_right"
    os.environ["LI_COMPILE_HY_WORLDPLAY"] = args.tree
    torch.set_grad_enabled(False)
    setting = Setting(args)
    calls = Calls(setting, args.context)
    print(f"torch {torch.__version__}, {setting.where}, {args.size}, {len(setting.model.double_blocks)} blocks, {args.context} latents of context")
    want = None if args.no_reference else calls.outputs(setting.model.float(), half=False)
    setting.model.to(calls.dtype)
    floors = calls.floors(args.tflops) if setting.device.type == "cuda" else {}
    print("| variant | call | ms | of eager | of Inductor | error | first call s | peak GiB |\n|---|---|---:|---:|---:|---:|---:|---:|")
    times: dict[tuple[str, str], float] = {}
    for name in args.variants:
        for call, ms, first, peak, got in calls.measure(name, args):
            times[name, call] = ms
            of = lambda peer: f"{times[peer, call] / ms:.2f}x" if (peer, call) in times else ""
            error = f"{distance(got, want[call]):.1e}" if want else ""
            print(f"| {name} | {call} | {ms:.2f} | {of('eager')} | {of('inductor')} | {error} | {first:.1f} | {peak:.2f} |", flush=True)
    for call, (attention, products) in floors.items():
        print(f"floor of {call}: {attention + products:.2f} ms, of which attention {attention:.2f}")


class Calls:
    """The inputs of the three calls, and how they are run."""

    def __init__(self, setting: Setting, context: int) -> None:
        self.setting, self.context, self.dtype = setting, context, next(setting.model.parameters()).dtype

    def arguments(self, call: str, dtype: torch.dtype) -> dict:
        given, device = self.setting.given, self.setting.device
        count = {"first step": 0, "context": self.context, "step": self.context}[call]
        frames = torch.arange(count) if call == "context" else torch.arange(count, count + 4)
        hidden = torch.cat([given[name][:, :, frames.to(device)] for name in ("latents", "cond_latents")], 1).to(dtype)
        poses = {name: given[name][:, frames].to(device, dtype) for name in ("viewmats", "Ks", "action")}
        return dict(bi_inference=False, ar_txt_inference=False, ar_vision_inference=True, timestep_r=None, mask_type="i2v", return_dict=False,
                    hidden_states=hidden, timestep=torch.full((len(frames),), 14.0 if call == "context" else 833.3, device=device), **poses,
                    cache_vision=call == "context", rope_temporal_size=len(frames) if call == "context" else count + 4,
                    start_rope_start_idx=0 if call == "context" else count)

    def text(self, model, dtype: torch.dtype) -> list[dict]:
        g, device = self.setting.given, self.setting.device
        return model(bi_inference=False, ar_txt_inference=True, ar_vision_inference=False, text_states=g["prompt_embeds"].to(dtype),
                     encoder_attention_mask=g["prompt_mask"], timestep_txt=torch.zeros(1, dtype=dtype, device=device),
                     vision_states=g["vision_states"].to(dtype), mask_type="i2v", kv_cache=[], cache_txt=True,
                     extra_kwargs={k: v.to(dtype) if v.is_floating_point() else v for k, v in g["extra_kwargs"].items()})

    def autocast(self, half: bool):
        return torch.autocast("cuda", torch.bfloat16, enabled=half and self.setting.device.type == "cuda")

    def runs(self, model, half: bool = True):
        """{call: a function that makes it}; a step reads the context that was encoded last. The text is upstream's, eager."""
        dtype = self.dtype if half else torch.float32
        with self.autocast(half):
            text = self.text(getattr(model, "original", model), dtype)
        last = {"context": text, "first step": text}

        def run(call: str):
            arguments = self.arguments(call, dtype)

            def once():
                with self.autocast(half):
                    if call == "context":
                        last["context"] = text
                        last["context"] = model(kv_cache=text, **arguments)
                        return last["context"]
                    return model(kv_cache=text if call == "first step" else last["context"], **arguments)[0]

            return once

        return {call: run(call) for call in CALLS}

    def outputs(self, model, half: bool) -> dict:
        return {call: keep(once()) for call, once in self.runs(model, half).items()}

    def measure(self, name: str, args):
        """(call, ms, seconds of the first, peak GiB, result), one by one."""
        torch._dynamo.reset()
        cuda, model = self.setting.device.type == "cuda", self.setting.model
        sync = torch.cuda.synchronize if cuda else lambda: None
        fast = model if VARIANTS[name] is None else li_compile.compile(model, self.setting.config(name))
        for call, once in self.runs(fast).items():
            start = time.perf_counter()
            out = keep(once())
            sync()
            first = time.perf_counter() - start
            for _ in range(2):
                once()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            taken = []
            for _ in range(args.iterations):
                sync()
                start = time.perf_counter()
                once()
                sync()
                taken.append(time.perf_counter() - start)
            peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0
            yield call, statistics.median(taken) * 1e3, first, peak, out
            if args.profile:
                profiled(f"{name}, {call}", once, self.setting.device.type)
        if fast is not model:
            fast.detach()

    def floors(self, tflops: float) -> dict[str, tuple[float, float]]:
        """{call: ms of dense attention, ms of everything else that is a product}"""
        model, found = self.setting.model, {}
        heads, dim = model.double_blocks[0].heads_num, model.hidden_size // model.double_blocks[0].heads_num
        for call, once in self.runs(model).items():
            counter = FlopCounterMode(display=False)
            with counter:
                once()
            flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
            products = sum(n for op, n in flops.items() if "attention" not in op)
            area = self.setting.given["latents"].shape[3] * self.setting.given["latents"].shape[4]
            own, held = (self.context if call == "context" else 4) * area, self.context * area if call == "step" else 0
            text = sum(int(x) for x in (self.setting.given["prompt_mask"].sum(), 729))
            q, kv = (torch.randn(2, heads, n, dim, dtype=self.dtype, device="cuda") for n in (own, own + held + text))
            found[call] = len(model.double_blocks) * fastest(q, kv), products / tflops / 1e9
        return found


def fastest(q, kv) -> float:
    """ms of PyTorch's fastest dense attention."""
    best = float("inf")
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            run = lambda: torch.nn.functional.scaled_dot_product_attention(q, kv, kv)
            for _ in range(3):
                run()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                run()
            end.record()
            torch.cuda.synchronize()
            best = min(best, start.elapsed_time(end) / 10)
    return best


def keep(out):
    """What of a call's result is compared, on the host."""
    if isinstance(out, torch.Tensor):
        return out.float().cpu()
    return [torch.stack([e["k_vision"], e["v_vision"]]).float().cpu() for e in out[:: max(len(out) - 1, 1)]]


def distance(got, want) -> float:
    return relative(got, want) if isinstance(got, torch.Tensor) else max(relative(a, b) for a, b in zip(got, want))


if __name__ == "__main__":
    main()
