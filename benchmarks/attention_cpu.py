"""li::sparse_attention on the CPU against dense attention and FlexAttention, in one process.

    python benchmarks/attention_cpu.py                 # the whole table
    python benchmarks/attention_cpu.py --quick         # without FlexAttention (which needs a C++ compiler)
    python benchmarks/attention_cpu.py --threads 1 --cpu-time   # robust on a busy machine

Shapes are those of the Doom World example: two branches, 4 heads of 64, 12 x 16 tokens a latent frame, chunks of 4
frames, 64 text tokens; blocks of 64 tokens, which are 4 x 4 x 4 tiles. Each figure is the ratio of medians to dense
scaled_dot_product_attention over ready concatenated K and V, the variants taking turns; for ours it is the whole
operator, from the model's q, k and v: token layout, selection, attention and the way back. Beside it stands the
relative L2 error against fp64 attention over the same blocks, and the ceiling 1 / density that an operator with no
overhead at all would reach. FlexAttention gets the same blocks, ready-made, in block order: its layout and selection
are not counted, nor is its compilation.

"gathered matmul" is what lost among our own: gather, bmm, softmax, bmm. Here it gets ready-made blocks and computes no
LSE; put into the operator with both it was no faster, and far slower whenever another process wanted the cores.

Every one of these shares its work between threads in many small portions and waits for all of them after each, so on a
busy machine two threads measure the scheduler. Trust runs where "dense" repeats, or --threads 1 --cpu-time.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from li_compile.kernels import density, sparse_attention
from li_compile.kernels.layout import neighbour_mask, tile_order, tile_order_inverse
from li_compile.kernels.plan import CONTEXT, CURRENT, TEXT, make_plan
from li_compile.kernels.selection import block_means, block_scores, choose_blocks
from li_compile.kernels.workspace import scratch

BATCH, HEADS, DIM, HEIGHT, WIDTH, FRAMES, TEXT_TOKENS, BLOCK, TILE = 2, 4, 64, 12, 16, 4, 64, 64, (4, 4, 4)
SCALE = DIM**-0.5
CASES = [(mode, frames) for mode in ("decode", "prefill") for frames in (8, 12, 20)]


def medians(functions, repeats, clock):
    times = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            start = clock()
            function()
            if turn >= 2:
                times[name].append(clock() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def make(mode, frames):
    segment = lambda n: torch.randn(BATCH, HEADS, n, DIM)
    now = (FRAMES if mode == "decode" else frames) * HEIGHT * WIDTH
    lengths = [TEXT_TOKENS, frames * HEIGHT * WIDTH, now] if mode == "decode" else [TEXT_TOKENS, now]
    roles = [TEXT, CONTEXT, CURRENT] if mode == "decode" else [TEXT, CURRENT]
    return segment(now), [segment(n) for n in lengths], [segment(n) for n in lengths], lengths, roles


def block_inputs(q, k, v, lengths, roles):
    """What the operator hands to its attention kernel, made with its own parts (all blocks are whole here)."""
    plan = make_plan(lengths, roles, HEIGHT, WIDTH, TILE, BLOCK, 0.175, 0.3)
    grid = lambda n: (n // (HEIGHT * WIDTH), HEIGHT, WIDTH, TILE)
    pack = lambda xs: torch.cat([xs[s] if roles[s] == TEXT else xs[s][:, :, tile_order(*grid(lengths[s]))] for s in plan.order], 2)
    queries, keys, values = q[:, :, tile_order(*grid(q.shape[2]))], pack(k), pack(v)
    whole = lambda x: torch.full((x.shape[2] // BLOCK,), BLOCK, dtype=torch.int32)
    pool = keys[:, :, plan.prefix_blocks * BLOCK :]
    scores = block_scores(block_means(queries, whole(queries), BLOCK)[0], block_means(pool, whole(pool), BLOCK)[0], None, None, SCALE)
    near = None if plan.decode else neighbour_mask(*grid(q.shape[2]), BLOCK)
    indices, counts = choose_blocks(scores, forced=near, keep=plan.keep, pitch=plan.pitch - plan.prefix_blocks)
    first = torch.arange(plan.prefix_blocks, dtype=torch.int32).expand(*indices.shape[:3], -1)
    return queries, keys, values, torch.cat((first, indices + plan.prefix_blocks), -1), counts + plan.prefix_blocks


def exact(queries, keys, values, indices, counts, inverse):
    mask = torch.zeros(*indices.shape[:3], keys.shape[2] // BLOCK, dtype=torch.bool)
    used = torch.arange(indices.shape[-1]) < counts[..., None]
    mask = mask.to(torch.int8).scatter_add_(-1, indices.long(), used.to(torch.int8)).bool()
    mask = mask.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    return F.scaled_dot_product_attention(queries.double(), keys.double(), values.double(), attn_mask=mask, scale=SCALE)[:, :, inverse]


def gathered_matmul(queries, keys, values, indices, group=4):
    """bmm, softmax, bmm over gathered blocks (equal counts only)."""
    rows, width, blocks = indices[..., 0].numel(), indices.shape[-1], keys.shape[2] // BLOCK
    flat = indices.reshape(rows, width) + (torch.arange(rows) // indices.shape[2] * blocks)[:, None]
    q, out = (queries * SCALE).view(rows, BLOCK, DIM), torch.empty(rows, BLOCK, DIM)
    k_rows, v_rows = keys.view(-1, BLOCK * DIM), values.view(-1, BLOCK * DIM)
    k_group, v_group = (scratch(name, (group * width, BLOCK * DIM), q) for name in ("bench_k", "bench_v"))
    for start in range(0, rows, group):
        ids = flat[start : start + group].flatten()
        n = ids.numel() // width
        torch.index_select(k_rows, 0, ids, out=k_group[: n * width])
        torch.index_select(v_rows, 0, ids, out=v_group[: n * width])
        k, v = (x[: n * width].view(n, width * BLOCK, DIM) for x in (k_group, v_group))
        torch.bmm(torch.bmm(q[start : start + n], k.transpose(1, 2)).softmax(-1), v, out=out[start : start + n])
    return out.view_as(queries)


def flex(queries, keys, values, indices, counts):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    none = torch.zeros(*indices.shape[:3], keys.shape[2] // BLOCK, dtype=torch.int32)
    full = none.clone()
    full[..., : indices.shape[-1]] = indices
    sizes = dict(BLOCK_SIZE=(BLOCK, BLOCK), seq_lengths=(queries.shape[2], keys.shape[2]), compute_q_blocks=False)
    mask = BlockMask.from_kv_blocks(torch.zeros_like(counts), none, counts, full, **sizes)
    attention = torch.compile(flex_attention, dynamic=False)
    return lambda: attention(queries, keys, values, block_mask=mask, scale=SCALE)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="such as prefill-12")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds of the process; only with one thread")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {options.threads} threads, fp32, medians of {options.repeats}; ratio to dense (error)")
    for mode, frames in CASES:
        if options.only and options.only != f"{mode}-{frames}":
            continue
        q, k, v, lengths, roles = make(mode, frames)
        dense_k, dense_v = torch.cat(k, 2), torch.cat(v, 2)
        blocks = block_inputs(q, k, v, lengths, roles)
        inverse = tile_order_inverse(q.shape[2] // (HEIGHT * WIDTH), HEIGHT, WIDTH, TILE)
        share = density(lengths, roles, HEIGHT, WIDTH, TILE, BLOCK, 0.175, 0.3).ratio
        ours = lambda sub: sparse_attention(q, k, v, roles, HEIGHT, WIDTH, TILE, BLOCK, 0.175, 0.3, sub, SCALE)
        variants = {"ours": lambda: ours(1)}
        if len(set(blocks[4].flatten().tolist())) == 1:
            variants["gathered matmul"] = lambda: gathered_matmul(*blocks[:4])[:, :, inverse]
        if not options.quick:
            run = flex(*blocks)
            variants["flex"] = lambda: run()[:, :, inverse]
        want = exact(*blocks, inverse)
        errors = {name: ((f().double() - want).norm() / want.norm()).item() for name, f in variants.items()}
        timed = {"dense": lambda: F.scaled_dot_product_attention(q, dense_k, dense_v, scale=SCALE), **variants, "ours, 4 sub-blocks": lambda: ours(4)}
        times = medians(timed, options.repeats, clock)
        cells = [f"{n} {times['dense'] / t:.2f}x" + (f" ({errors[n]:.0e})" if n in errors else "") for n, t in times.items() if n != "dense"]
        print(f"{mode} {frames:2}: dense {times['dense'] * 1e3:6.1f} ms, density {share:.3f}, ceiling {1 / share:.2f}x | " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
