"""Train Doom World from the packed data set of ``render.py``: the codec first, then the transformer.

One H100, at most 15 minutes for both. Every phase runs for a given time, not a given number of steps, and the
learning rate follows the clock, so that a slower GPU gives a weaker model and not an unfinished one.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from li_compile.kernels.view_overlap import view_overlap

from .codec import Codec
from .data import decode_image
from .model import ChunkSampler, WorldConfig, WorldModel, run_block, sigmas
from .rollout import first_prompt, rollout
from .weights import load_world, save_weights

CONTEXTS = {0: 0.10, 4: 0.10, 8: 0.22, 12: 0.26, 16: 0.10, 20: 0.22}  # context length: share of the batches
TEMPORAL = {8: 4, 12: 4, 16: 8, 20: 12}  # context length: newest frames in it; the rest is anchor and one retrieved chunk
OFFSETS = 4  # a trajectory may start at its first few frames


class Clock:
    """Progress through a phase of so many minutes, from 0 to 1."""

    def __init__(self, minutes: float):
        self.start, self.seconds = time.monotonic(), 60 * minutes

    def fraction(self) -> float:
        return min(1.0, (time.monotonic() - self.start) / self.seconds)


def learning_rate(fraction: float, peak: float) -> float:
    """Linear warm-up over 3 % of the phase, then a cosine to zero."""
    return peak * min(fraction / 0.03, 0.5 * (1 + np.cos(np.pi * fraction)) + 1e-3)


class Data:
    """The packed set on the GPU: frames uint8 [N, 3, H, W], poses and labels by trajectory."""

    def __init__(self, folder: pathlib.Path, device: str):
        index = np.load(folder / "index.npz", allow_pickle=False)
        blob, offset = (folder / "frames.bin").read_bytes(), index["offset"]
        pieces = [blob[a:b] for a, b in zip(offset[:-1], offset[1:])]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            frames = np.stack(list(pool.map(decode_image, pieces)))
        self.frames = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(device)
        trajectory = index["trajectory"]
        self.first = torch.from_numpy(np.searchsorted(trajectory, np.arange(trajectory.max() + 1))).to(device)
        self.length = int(np.bincount(trajectory).min())
        self.w2c = torch.from_numpy(index["w2c"]).to(device)
        self.action = torch.from_numpy(index["action"]).to(device)
        self.intrinsics = torch.from_numpy(index["K"]).float().to(device)
        self.split = index["split"]

    def of(self, split: str) -> Tensor:
        return torch.from_numpy(np.flatnonzero(self.split == split)).to(self.first.device)

    def frames_of(self, trajectories: Tensor) -> Tensor:
        return (self.first[trajectories][:, None] + torch.arange(self.length, device=self.first.device)).flatten()


def train_codec(data: Data, minutes: float, device: str, codec: Codec | None = None) -> Codec:
    """Train a codec; one that is given keeps its encoder, and so the meaning of its latents."""
    resumed, codec = codec is not None, (codec or Codec()).to(device).to(memory_format=torch.channels_last)
    parameters = [p.requires_grad_() for p in (codec.decoder if resumed else codec).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4, fused=True)
    pool = data.frames_of(data.of("train"))
    clock, step = Clock(minutes), 0
    while (fraction := clock.fraction()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fraction, 2e-3)
        x = data.frames[pool[torch.randint(len(pool), (96,), device=device)]].float() / 255
        x = x.flip(-1) if step % 2 else x
        with torch.autocast(device, torch.bfloat16):
            z = codec.encode_raw(x.contiguous(memory_format=torch.channels_last))
            y = codec.decode_raw(z + 0.02 * torch.randn_like(z))  # a little noise keeps the latents smooth
        y = y.float()
        # The high-pass term keeps texture that a plain mean squared error would give up.
        loss = F.mse_loss(y, x) + 0.5 * F.mse_loss(y - F.avg_pool2d(y, 3, 1, 1), x - F.avg_pool2d(x, 3, 1, 1))
        loss = loss + 1e-5 * z.float().square().mean() + 0.05 * F.l1_loss(y, x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 500 == 0:
            print(f"codec step {step} loss {loss.item():.5f}", flush=True)
    codec = codec.eval().float().requires_grad_(False)
    if resumed:
        return codec
    with torch.no_grad():
        z = torch.cat([codec.encode_raw(data.frames[i].float() / 255) for i in pool[::10].split(256)])
    codec.mean.copy_(z.mean((0, 2, 3)))
    codec.std.copy_(z.std((0, 2, 3)))
    return codec


@torch.no_grad()
def encode_all(codec: Codec, frames: Tensor, flip: bool) -> Tensor:
    return torch.cat([codec.encode((f.flip(-1) if flip else f).float() / 255) for f in frames.split(256)])


def mirror(data: Data) -> tuple[Tensor, Tensor]:
    """Cameras and actions of the mirrored world (left and right swapped)."""
    sign = torch.tensor([-1.0, 1, 1, 1], device=data.w2c.device)
    swap = torch.tensor([0, 1, 2, 4, 3, 6, 5, 8, 7], device=data.w2c.device)
    turn = torch.tensor([0, 2, 1, 3, 4, 5, 6, 7, 8], device=data.w2c.device)
    return data.w2c * sign[:, None] * sign, 9 * swap[data.action // 9] + turn[data.action % 9]


def context_tables(data: Data, chunk: int) -> dict[int, Tensor]:
    """For each context length N: frame offsets [trajectory, offset, chunk, N] in the trajectory, -1 where there are none."""
    chunks, device = (data.length - OFFSETS + 1) // chunk, data.w2c.device
    count = len(data.first)
    tables = {n: torch.full((count, OFFSETS, chunks, n), -1, dtype=torch.long) for n in CONTEXTS if n}
    for t in range(count):
        first = int(data.first[t])
        overlap = view_overlap(data.w2c[first:first + data.length], data.w2c[first:first + data.length],
                               fov=(90.0, 70.0)).cpu()
        for r in range(OFFSETS):
            s = overlap[r:r + chunks * chunk, r:r + chunks * chunk].view(chunks, chunk, chunks, chunk)
            score = s[..., [0, 2]].mean((1, 3))  # [query chunk, history chunk]
            for c in range(1, chunks):
                for n, table in tables.items():
                    if n == chunk * c:
                        table[t, r, c] = torch.arange(n)
                    elif chunk * c > n:
                        newest = TEMPORAL[n] // chunk if n in TEMPORAL else None
                        if newest is None:
                            continue
                        keep = {0, *range(c - newest, c)}
                        if n - TEMPORAL[n] > chunk:
                            keep.add(1 + int(score[c, 1:c - newest].argmax()))
                        keep = sorted(keep)
                        if len(keep) * chunk == n:
                            table[t, r, c] = torch.cat([torch.arange(k * chunk, k * chunk + chunk) for k in keep])
    return {n: table.to(device) for n, table in tables.items()}


class Batches:
    """Random training batches: chunks with the context that a policy would have chosen for them."""

    def __init__(self, data: Data, codec: Codec, config: WorldConfig):
        self.data, self.config = data, config
        self.latents = torch.stack([encode_all(codec, data.frames, flip).half() for flip in (False, True)])
        w2c, action = mirror(data)
        self.w2c, self.action = torch.stack([data.w2c, w2c]), torch.stack([data.action, action])
        self.tables = context_tables(data, config.chunk)
        train = data.of("train")
        self.choices = {}  # context length: [M, 3] of trajectory, offset, chunk
        for n, table in self.tables.items():
            t, r, c = (table[train][..., 0] >= 0).nonzero(as_tuple=True)
            self.choices[n] = torch.stack([train[t], r, c], 1)
        grid = torch.cartesian_prod(train, torch.arange(OFFSETS, device=train.device))
        self.choices[0] = torch.cat([grid, torch.zeros_like(grid[:, :1])], 1)
        self.rng = np.random.default_rng(0)

    def draw(self, size: int, n: int | None = None):
        n = int(self.rng.choice(list(CONTEXTS), p=list(CONTEXTS.values()))) if n is None else n
        pick = self.choices[n][torch.randint(len(self.choices[n]), (size,), device=self.w2c.device)]
        trajectory, offset, chunk = pick.unbind(1)
        start = self.data.first[trajectory] + offset
        flip = torch.randint(2, (size,), device=start.device)
        current = start[:, None] + chunk[:, None] * self.config.chunk + torch.arange(self.config.chunk, device=start.device)
        take = lambda x, i: x[flip[:, None], i]
        frames = lambda i: take(self.latents, i).transpose(1, 2).float()
        image = self.latents[flip, start].float()
        context = None
        if n:
            i = start[:, None] + self.tables[n][trajectory, offset, chunk]
            context = (frames(i), take(self.action, i), take(self.w2c, i))
        prompt = first_prompt(image, self.config) if n == 0 else image.new_zeros(
            size, self.config.channels + 1, self.config.chunk, *image.shape[-2:])
        return n, image, prompt, frames(current), take(self.action, current), take(self.w2c, current), context


def flow_loss(model: WorldModel, batch, levels: Tensor, intrinsics: Tensor) -> Tensor:
    """Velocity loss at the sampler's own noise levels (60 %) and in between; the context gets a little noise."""
    n, image, prompt, x0, action, w2c, context = batch
    size, device = x0.shape[0], x0.device
    k = intrinsics.expand(size, 3, 3)
    text = model.prefix(image)
    past = None
    if context is not None:
        latents, past_action, past_w2c = context
        latents = latents + torch.randn_like(latents) * 0.15 * torch.rand(size, 1, 1, 1, 1, device=device)
        blank = torch.zeros_like(prompt[:, :, :1]).expand(-1, -1, n, -1, -1)
        label = torch.full_like(past_action, model.config.context_time, dtype=torch.float32)
        _, past = model(torch.cat([latents, blank], 1), label, past_action, past_w2c, k, *text)
    u = torch.rand(size, device=device)
    between = model.config.shift * u / (1 + (model.config.shift - 1) * u)
    on_grid = levels[torch.randint(len(levels), (size,), device=device)]
    sigma = torch.where(torch.rand(size, device=device) < 0.6, on_grid, between)
    noise, s = torch.randn_like(x0), sigma[:, None, None, None, None]
    time_label = (1000 * sigma)[:, None].expand(-1, x0.shape[2])
    velocity, _ = model(torch.cat([(1 - s) * x0 + s * noise, prompt], 1), time_label, action, w2c, k, *text, past, n)
    return F.mse_loss(velocity.float(), noise - x0)


def train_world(data: Data, codec: Codec, minutes: float, device: str, batch: int, compiled: bool,
                model: WorldModel | None = None, config: WorldConfig = WorldConfig()) -> tuple[WorldModel, dict]:
    """Train a new model, or one that is given. The clock starts once everything is compiled."""
    batches = Batches(data, codec, config)
    if model is None:
        model = WorldModel(config, regional=False)
        model.initialise()
    model = model.to(device).train().requires_grad_()
    # The residual stream stays float32 from the first block on, so that all blocks share one compiled graph.
    hook = model.patch.register_forward_hook(lambda module, inputs, output: output.float())
    if compiled:
        model.run_block = torch.compile(run_block, dynamic=True)
    matrices = [p for n, p in model.blocks.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    average = {k: v.detach().clone() for k, v in model.named_parameters()}
    levels = torch.tensor(sigmas(config)[:-1], device=device)
    begin = time.monotonic()
    for n in (8, 20, 0) if compiled else ():
        with torch.autocast(device, torch.bfloat16):
            flow_loss(model, batches.draw(batch, n), levels, data.intrinsics).backward()
        print(f"compiled, context {n}: {time.monotonic() - begin:.0f} s", flush=True)
    clock, step, recent = Clock(minutes), 0, []
    while (fraction := clock.fraction()) < 1:
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = learning_rate(fraction, 1.5e-3)
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = flow_loss(model, batches.draw(batch), levels, data.intrinsics)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - decay)
        step += 1
        recent.append(loss.detach())
        if step % 250 == 0:
            print(f"world step {step} {fraction:.2f} loss {torch.stack(recent).mean().item():.4f}", flush=True)
            recent = []
    hook.remove()
    model.run_block = run_block
    model.load_state_dict(average)
    return model.eval().requires_grad_(False), {"steps": step, "batch": batch, "minutes": minutes}


@torch.no_grad()
def held_out(data: Data, codec: Codec, model: WorldModel, split: str, limit: int = 8) -> dict:
    """Mean PSNR in dB over held-out trajectories: codec alone, teacher-forced, free-running."""
    sampler, sums = ChunkSampler(model), {"codec": [], "teacher_forced": [], "free_running": []}
    psnr = lambda a, b: (-10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-10).log10()).mean().item()
    for t in data.of(split)[:limit]:
        first = int(data.first[t])
        part = slice(first, first + 64)
        truth = data.frames[part].float() / 255
        latents = codec.encode(truth)
        sums["codec"].append(psnr(codec.decode(latents), truth))
        for name, forced in (("teacher_forced", True), ("free_running", False)):
            out = rollout(model, sampler, latents, data.w2c[part], data.intrinsics, data.action[part], forced, seed=0)
            sums[name].append(psnr(codec.decode(out)[1:], truth[1:]))
    return {name: round(float(np.mean(values)), 2) for name, values in sums.items()} | {"trajectories": len(sums["codec"])}


def main(data: pathlib.Path = typer.Option(..., help="folder written by render.py"),
         out: pathlib.Path = typer.Option(..., help="where world.safetensors and training.json go"),
         minutes: float = typer.Option(14.0, help="training time, both phases"),
         codec_share: float = typer.Option(0.2, help="share of it for the codec"),
         resume: pathlib.Path | None = typer.Option(None, help="weights to go on from; the encoder stays as it is"),
         batch: int = 48, compiled: bool = True, seed: int = 0, device: str = "cuda",
         evaluate: int = typer.Option(8, help="held-out trajectories of each split to measure")) -> None:
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    packed = Data(data, device)
    print(f"{len(packed.frames)} frames, {len(packed.first)} trajectories, read in {time.monotonic() - begin:.0f} s", flush=True)
    model, codec = load_world(resume, device, regional=False) if resume else (None, None)
    codec = train_codec(packed, minutes * codec_share, device, codec)
    model, facts = train_world(packed, codec, minutes * (1 - codec_share), device, batch, compiled, model)
    save_weights(out / "world.safetensors", model, codec)
    facts |= {"codec_minutes": round(minutes * codec_share, 2), "gpu": torch.cuda.get_device_name() if device == "cuda" else device,
              "frames": len(packed.of("train")) * packed.length, "seconds": round(time.monotonic() - begin),
              "psnr_db": {split: held_out(packed, codec, model, split, evaluate) for split in ("val", "test")}}
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    typer.run(main)
