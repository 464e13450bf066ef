"""Block-sparse attention against the dense and sparse kernels that there are, in one process.

    python benchmarks/attention.py --device cuda --out out/attention.json --plot docs/attention.png
    python benchmarks/attention.py --device cpu --cases "doom decode 12" --threads 1 --cpu-time

Three levels. *kernel*: ready blocks and lists, the same for all. *operator*: from the current chunk's q, k and v to the
output, history packed before (decode), or from all of q, k and v (prefill); "raw" takes q, k and v before the norm, RoPE
and camera branches, which dense attention and the plain row get done. *layers*: the operator so many times over, each
layer with its own keys and values, in one CUDA graph.

All figures are medians of rounds in which the variants take turns, and ratios of the same round to dense attention over
ready, concatenated K and V (cuDNN on a GPU). A GPU's clock follows its power, so that times of single runs differ by
several percent; ratios of a round differ less. TFLOP/s count whole kept blocks. The relative L2 error is against fp32
attention over the same blocks, three query blocks of three heads. A peer whose output is wrong is said to be wrong.

FlashAttention 3 (package fa3-fwd) and 4 (flash-attn-4) take part where they can be imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from li_compile.kernels import Encoding, block_sparse_attention, pack, pack_context, sparse_attention, sparse_decode, use_provider
from li_compile.kernels.plan import CONTEXT, CURRENT, TEXT, make_plan
from li_compile.kernels.selection import Choice, choose
from li_compile.kernels.sparse_attention import plan_tables


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's attention. batch: branches; context and current in latent frames; ratio: of the history in decode, of all
    in prefill (no context)."""

    name: str
    batch: int
    heads: int
    dim: int
    height: int
    width: int
    tile: tuple[int, int, int]
    block: int
    text: int
    context: int
    current: int
    ratio: float

    @property
    def lengths(self) -> list[int]:
        frame = self.height * self.width
        return [n for n in (self.text, self.context * frame, self.current * frame) if n]

    @property
    def roles(self) -> list[int]:
        return [r for r, n in ((TEXT, self.text), (CONTEXT, self.context), (CURRENT, self.current)) if n]

    def plan(self, ratio: float | None = None):
        ratio = self.ratio if ratio is None else ratio
        return make_plan(self.lengths, self.roles, self.height, self.width, self.tile, self.block, ratio, ratio)


def _cases() -> list[Case]:
    hy = lambda name, context, current, ratio: Case(name, 2, 16, 128, 30, 52, (4, 8, 4), 128, 879, context, current, ratio)
    doom = lambda name, context, current, ratio: Case(name, 2, 4, 64, 12, 16, (4, 4, 4), 64, 64, context, current, ratio)
    return [
        *(hy(f"hy decode {n}", n, 4, 0.175) for n in (8, 12, 20)),
        *(hy(f"hy prefill {n}", 0, n, 0.30) for n in (8, 12, 20)),
        Case("matrix 20", 1, 24, 128, 22, 40, (4, 4, 8), 128, 0, 0, 20, 0.30),
        *(doom(f"doom decode {n}", n, 4, 0.175) for n in (8, 12, 20)),
        *(doom(f"doom prefill {n}", 0, n, 0.30) for n in (8, 12, 20)),
    ]


class Inputs:
    """Random q, k, v of a case as a model's projections leave them ([B, L, H, D] memory), packed blocks and lists."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, ratio: float | None = None) -> None:
        self.case, self.plan, self.scale = case, case.plan(ratio), case.dim**-0.5
        generator = torch.Generator(device).manual_seed(0)
        new = lambda n, batch: torch.randn(batch, n, case.heads, case.dim, device=device, generator=generator).to(dtype).transpose(1, 2)
        frames = case.current
        self.raw = [new(case.lengths[-1], case.batch // 2 or 1) for _ in range(3)]  # before the branches
        self.segments = [[new(n, case.batch) for n in case.lengths[:-1]] for _ in range(2)]
        self.encodings = {}
        if case.batch == 2:
            angle = torch.rand(case.lengths[-1], case.dim // 2, device=device).repeat_interleave(2, 1) * 6
            eye = torch.eye(4, device=device).repeat(1, frames, 1, 1)
            camera = lambda: eye + 0.05 * torch.randn(1, frames, 4, 4, device=device)
            norm = lambda: torch.ones(case.dim, device=device, dtype=dtype)
            self.encodings = {"q_norm": norm(), "k_norm": norm(), "cos": angle.cos(), "sin": angle.sin(), "q_camera": camera(),
                              "kv_camera": camera()}  # fmt: skip
        e = self.encodings
        q, k, v = (Encoding(e.get(f"{n}_norm"), 1e-6, e.get("cos"), e.get("sin"), e.get("q_camera" if n == "q" else "kv_camera")) if n != "v"
                   else Encoding(camera=e.get("kv_camera")) for n in "qkv")  # fmt: skip
        plain = lambda x, e: pack(x, None, 1, 1, e.norm, e.eps, e.cos, e.sin, e.camera)[0] if self.encodings else x
        strided = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
        self.q, self.k, self.v = (strided(plain(x, e)) for x, e in zip(self.raw, (q, k, v)))
        self.dense = [torch.cat([*xs, x], 2).contiguous() for xs, x in zip(self.segments, (self.k, self.v))]
        self._lists()

    def _lists(self) -> None:
        case, plan, size = self.case, self.plan, self.case.block
        tables = plan_tables(plan, 4, self.q.device)
        self.blocks_q, q_means = pack(self.q, tables.order, size, 4)
        keys, k_means = pack(self.k, tables.order, size, 4)
        values, _ = pack(self.v, tables.order, size, 1)
        self.static = None
        if plan.static:
            self.static = pack_context(*self.segments, case.roles[:-1], case.height, case.width, list(case.tile), size, 4)
            keys, values = (torch.cat(both, 2) for both in ((self.static[0], keys), (self.static[1], values)))
        self.blocks_k, self.blocks_v, self.valid, self.rows = keys, values, tables.valid, tables.rows.long()
        means = self.static[2] if plan.decode else k_means
        self.indices, self.counts, self.tails, _ = choose(Choice(
            q_means, means, tables.q_counts, tables.k_counts, tables.valid, tables.keep, tables.near, plan.first, size, 4,
            self.scale, plan.pitch, False))  # fmt: skip

    @property
    def kept_flops(self) -> float:
        case = self.case
        return 4 * case.batch * case.heads * sum(self.plan.kept) * case.block**2 * case.dim

    @property
    def dense_flops(self) -> float:
        case = self.case
        return 4 * case.batch * case.heads * self.q.shape[2] * sum(case.lengths) * case.dim

    def error(self, out: Tensor, packed: bool, dense: bool) -> float:
        """Relative L2 of three query blocks of three heads; out in block order (packed) or the model's."""
        size, worst = self.case.block, 0.0
        for b, h, i in ((0, 0, 0), (self.case.batch - 1, 1, self.counts.shape[2] // 2), (0, self.case.heads - 1, self.counts.shape[2] - 1)):
            rows = slice(i * size, (i + 1) * size)
            places = self.rows[rows]
            real = places >= 0
            blocks = range(len(self.valid)) if dense else self.indices[b, h, i, : self.counts[b, h, i]].tolist()
            at = torch.cat([torch.arange(j * size, j * size + int(self.valid[j]), device=out.device) for j in blocks])
            scores = self.blocks_q[b, h, rows].float()[real] @ self.blocks_k[b, h, at].float().T * self.scale
            want = scores.softmax(-1) @ self.blocks_v[b, h, at].float()
            got = (out[b, h, rows][real] if packed else out[b, h, places[real]]).float()
            worst = max(worst, ((got - want).norm() / want.norm()).item())
        return worst


@contextlib.contextmanager
def dense_backend(device: str, name: str = "cudnn"):
    if device != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if name == "cudnn" else SDPBackend.FLASH_ATTENTION):
        yield


@dataclasses.dataclass
class Variant:
    """run: what is timed; packed: its output is in block order; dense: it attends to everything."""

    run: Callable[[], Tensor]
    packed: bool = False
    dense: bool = False


def dense_variant(x: Inputs, device: str, backend: str = "cudnn") -> Variant:
    def run():
        with dense_backend(device, backend):
            return F.scaled_dot_product_attention(x.q, *x.dense, scale=x.scale)

    return Variant(run, dense=True)


def kernel_level(x: Inputs, device: str, with_flex: bool = True) -> dict[str, Variant]:
    def ours(name):
        def run():
            with use_provider(name):
                return block_sparse_attention(x.blocks_q, x.blocks_k, x.blocks_v, x.indices, x.counts, x.valid, x.case.block, x.scale, x.tails)[0]
        return Variant(run, packed=True)

    variants = {"dense": dense_variant(x, device)}
    if device == "cuda":
        variants |= {"FlashAttention 2": dense_variant(x, device, "flash"), "ours, Hopper": ours("hopper"), "ours, Triton": ours("triton")}
    else:
        variants["ours"] = ours("cpu")
    return variants | (_flex(x) if with_flex else {}) | _flash_packages(x)


def _flex(x: Inputs) -> dict[str, Variant]:
    """FlexAttention on the same blocks; partly filled ones get the mask, as they need it."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    size, blocks = x.case.block, len(x.valid)
    used = torch.arange(x.indices.shape[-1], device=x.q.device) < x.counts[..., None]
    partial = (x.valid < size)[x.indices.long()] & used

    def lists(chosen):
        numbers = torch.where(chosen, x.indices, blocks).sort(-1).values
        padded = torch.zeros(*x.counts.shape, blocks, dtype=torch.int32, device=x.q.device)
        padded[..., : numbers.shape[-1]] = torch.where(numbers == blocks, 0, numbers)
        return chosen.sum(-1, dtype=torch.int32), padded

    valid = x.valid
    mask = BlockMask.from_kv_blocks(*lists(partial), *lists(used & ~partial), BLOCK_SIZE=(size, size), compute_q_blocks=False,
                                    mask_mod=lambda b, h, q, kv: kv % size < valid[kv // size], seq_lengths=(x.blocks_q.shape[2], x.blocks_k.shape[2]))  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    return {"FlexAttention": Variant(lambda: compiled(x.blocks_q, x.blocks_k, x.blocks_v, block_mask=mask, scale=x.scale), packed=True)}


def _flash_packages(x: Inputs) -> dict[str, Variant]:
    """FlashAttention 3 (dense) and 4 (block-sparse; its padded keys are not masked, so its error shows them)."""
    variants = {}
    with contextlib.suppress(ImportError):
        import sys

        import fa3_fwd_config

        sys.modules["flash_attn_config"] = fa3_fwd_config
        from fa3_fwd_interface import flash_attn_func

        args = [y.transpose(1, 2).contiguous() for y in (x.q, *x.dense)]
        first = lambda out: out[0] if isinstance(out, tuple) else out
        variants["FlashAttention 3"] = Variant(lambda: first(flash_attn_func(*args, softmax_scale=x.scale)).transpose(1, 2), dense=True)
    with contextlib.suppress(ImportError):
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_fwd

        if x.case.block == 128:
            blocked = [y.transpose(1, 2).contiguous() for y in (x.blocks_q, x.blocks_k, x.blocks_v)]
            none, empty = torch.zeros_like(x.counts), torch.zeros(*x.counts.shape, 1, dtype=torch.int32, device=x.q.device)
            ascending = torch.where(torch.arange(x.indices.shape[-1], device=x.q.device) < x.counts[..., None], x.indices, 2**30).sort(-1).values
            ascending = torch.where(ascending == 2**30, 0, ascending).contiguous()
            tensors = BlockSparseTensorsTorch(none, empty, x.counts, ascending, block_size=(128, 128))
            run = lambda: _flash_attn_fwd(*blocked, softmax_scale=x.scale, block_sparse_tensors=tensors)[0].transpose(1, 2)
            variants["FlashAttention 4, sparse"] = Variant(run, packed=True)
    return variants


def operator_level(x: Inputs, device: str) -> dict[str, Variant]:
    case, plan = x.case, x.plan
    ratio = plan.keep[0][0] / plan.candidates if plan.decode else case.ratio
    settings = (case.height, case.width, list(case.tile), case.block)

    def call(q, k, v, sub, more):
        if plan.decode:
            lengths, roles = case.lengths[:-1], case.roles[:-1]
            return sparse_decode(q, k, v, *static[sub], lengths, roles, *settings, ratio, sub, x.scale, **more)
        return sparse_attention(q, [*x.segments[0], k], [*x.segments[1], v], case.roles, *settings, ratio, ratio, sub, x.scale, **more)

    static = {}
    if plan.decode:
        static = {sub: pack_context(*x.segments, case.roles[:-1], *settings, sub) for sub in (1, 4)}
    variants = {"dense": dense_variant(x, device), "ours": Variant(lambda: call(x.q, x.k, x.v, 4, {})),
                "ours, block means": Variant(lambda: call(x.q, x.k, x.v, 1, {}))}  # fmt: skip
    if x.encodings:
        variants["ours, raw"] = Variant(lambda: call(*x.raw, 4, x.encodings))
    return variants


def event_times(run: Callable, at_least: float = 200.0) -> float:
    """Median milliseconds of calls that go on for so many, the first half uncounted: a GPU's clock follows the power of the
    last tens of milliseconds, and a short burst would be timed at a clock that no long run keeps."""
    first = _events(run, 2)
    times = max(6, min(400, int(at_least / max(first[-1], 1e-3))))
    return statistics.median(_events(run, times)[times // 2 :])


def _events(run: Callable, times: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def measure(variants: dict[str, Variant], x: Inputs, rounds: int, clock, graphs: bool) -> list[dict]:
    runs, errors = {}, {}
    for name, variant in variants.items():
        out = variant.run()
        errors[name] = x.error(out, variant.packed, variant.dense) if not name.endswith("block means") else None
        runs[name] = _graph(variant.run) if graphs else variant.run
    times = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in list(runs.items())[:: 1 if turn % 2 else -1]:
            if x.q.device.type == "cuda":
                took = event_times(run)
            else:
                start = clock()
                run()
                took = (clock() - start) * 1e3
            if turn:
                times[name].append(took)
    rows = []
    for name, variant in variants.items():
        ms = statistics.median(times[name])
        ratios = [d / t for d, t in zip(times["dense"], times[name])]
        flops = x.dense_flops if variant.dense else x.kept_flops
        rows.append({"variant": name, "ms": ms, "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
                     "tflops": flops / ms / 1e9, "error": errors[name]})  # fmt: skip
    return rows


def _graph(run: Callable) -> Callable:
    """Replays of a CUDA graph: the time of the device's work without the host's."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def layers_level(case: Case, count: int, rounds: int) -> list[dict]:
    """So many layers in one CUDA graph, each with keys and values of its own. Errors are those of the operator level."""
    x = Inputs(case, "cuda", torch.bfloat16)
    ours = operator_level(x, "cuda")
    settings = (case.height, case.width, list(case.tile), case.block)
    static = [pack_context(*x.segments, case.roles[:-1], *settings, 4) for _ in range(count)]
    dense = [[y.clone() for y in x.dense] for _ in range(count)]
    ratio = x.plan.keep[0][0] / x.plan.candidates

    def sparse():
        for packed in static:
            out = sparse_decode(x.q, x.k, x.v, *packed, case.lengths[:-1], case.roles[:-1], *settings, ratio, 4, x.scale)
        return out

    def all_dense():
        with dense_backend("cuda"):
            for k, v in dense:
                out = F.scaled_dot_product_attention(x.q, k, v, scale=x.scale)
        return out

    x.case = dataclasses.replace(case, name=f"{case.name} x {count}")
    rows = measure({"dense": Variant(all_dense, dense=True), "ours": Variant(sparse)}, x, rounds, None, graphs=True)
    del ours
    for row in rows:
        row["tflops"] *= count
    return rows


def show(console: Console, level: str, case: str, plan, rows: list[dict]) -> None:
    kept = sum(plan.kept) / len(plan.kept)
    table = Table(title=f"{case}, {level}: {kept:.0f} of {plan.total} blocks", title_justify="left")
    for column in ("variant", "ms", "ratio to dense", "of rounds", "TFLOP/s", "rel. L2"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for r in rows:
        wrong = r["error"] is not None and not r["error"] < 0.05
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        table.add_row(r["variant"], "wrong" if wrong else f"{r['ms']:.3f}", "" if wrong else f"{r['ratio']:.2f}x",
                      f"{r['least']:.2f} to {r['most']:.2f}", "" if wrong else f"{r['tflops']:.0f}", error)  # fmt: skip
    console.print(table)


def plot(path: pathlib.Path, sweep: dict[float, list[dict]], case: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    densities = sorted(sweep)
    for name in dict.fromkeys(r["variant"] for rows in sweep.values() for r in rows):
        if name != "dense":
            line = [next((r["ratio"] for r in sweep[d] if r["variant"] == name), None) for d in densities]
            axes.plot(densities, line, marker="o", markersize=3, label=name)
    axes.plot(densities, [1 / d for d in densities], color="0.7", linestyle=":", label="1 / density")
    axes.axhline(1, color="0.7", linewidth=0.8)
    axes.set(xlabel="kept share of all blocks", ylabel="speed over dense attention", xscale="log", yscale="log", title=case)
    axes.set_xticks([0.2, 0.3, 0.5, 0.7, 1.0], labels=["0.2", "0.3", "0.5", "0.7", "1"])
    axes.set_yticks([1, 2, 3, 5], labels=["1x", "2x", "3x", "5x"])
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(
    device: str = "cpu",
    cases: Annotated[str, typer.Option(help="Comma-separated; empty: all (on the CPU those of Doom World).")] = "",
    levels: str = "kernel,operator",
    layers: Annotated[int, typer.Option(help="Layers in one CUDA graph for 'hy decode 12', 0 for none.")] = 0,
    sweep: Annotated[str, typer.Option(help="Case over whose history ratio to sweep.")] = "",
    rounds: int = 7,
    flex: Annotated[bool, typer.Option(help="FlexAttention too, which takes some seconds to compile for each case.")] = True,
    dtype: str = "",
    graphs: Annotated[bool, typer.Option(help="Time CUDA graph replays, without launch overhead.")] = True,
    threads: int = 0,
    cpu_time: Annotated[bool, typer.Option(help="Count the process's CPU seconds; with one thread, on a busy machine.")] = False,
    out: pathlib.Path | None = None,
    plot_to: pathlib.Path | None = None,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    console = Console(width=110)
    kind = getattr(torch, dtype) if dtype else torch.bfloat16 if device == "cuda" else torch.float32
    clock = time.process_time if cpu_time else time.perf_counter
    wanted = [c for c in _cases() if c.name in cases.split(",")] if cases else [c for c in _cases() if device == "cuda" or c.name.startswith("doom")]
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"torch {torch.__version__}, {name}, {kind}, medians of {rounds} rounds")
    result = {"torch": torch.__version__, "device": name, "dtype": str(kind), "rounds": rounds, "rows": [], "sweep": {}}
    graphs = graphs and device == "cuda"
    with torch.no_grad():
        for case in wanted:
            x = Inputs(case, device, kind)
            for level in levels.split(","):
                variants = kernel_level(x, device, flex) if level == "kernel" else operator_level(x, device)
                rows = measure(variants, x, rounds, clock, graphs)
                show(console, level, case.name, x.plan, rows)
                result["rows"] += [{"case": case.name, "level": level, "kept": sum(x.plan.kept) / len(x.plan.kept), "total": x.plan.total, **r} for r in rows]
            del x
        if layers and device == "cuda":
            case = next(c for c in _cases() if c.name == "hy decode 12")
            rows = layers_level(case, layers, rounds)
            show(console, f"{layers} layers", case.name, case.plan(), rows)
            result["rows"] += [{"case": case.name, "level": f"{layers} layers", **r} for r in rows]
        if sweep:
            case = next(c for c in _cases() if c.name == sweep)
            for ratio in (0.0, 0.05, 0.1, 0.175, 0.3, 0.5, 0.75, 0.999):
                x = Inputs(dataclasses.replace(case, ratio=ratio), device, kind)
                picked = kernel_level(x, device, with_flex=False)
                picked["ours, whole operator"] = operator_level(x, device)["ours"]
                rows = measure(picked, x, rounds, clock, graphs)
                density = sum(x.plan.kept) / len(x.plan.kept) / x.plan.total
                show(console, f"ratio {ratio}", case.name, x.plan, rows)
                result["sweep"][density] = rows
            if plot_to:
                plot(plot_to, result["sweep"], f"{case.name}, {name}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
