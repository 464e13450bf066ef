"""The Doom World transformer: a reduced autoregressive video diffusion transformer.

Same anatomy as HY-WorldPlay (HunyuanVideo-1.5 with camera control), written from its description: patch tokens of
latent frames, a text-like prefix with a stream of its own, attention over ``[text | context | current]`` in two
branches stacked on the batch axis (RoPE and PRoPE, the projective camera encoding), per-frame time and action
embedding stretched over the tokens before the modulation, and a context prefill that returns keys and values.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """Sizes of the model. Frames are latent frames; one latent frame is one rendered frame."""

    channels: int = 16  # of a latent frame
    height: int = 12  # tokens (= latent pixels) of a frame
    width: int = 16
    dim: int = 256
    heads: int = 4
    depth: int = 6
    mlp_ratio: int = 3
    cond_dim: int = 128  # of the time and action embedding
    text_dim: int = 96
    registers: int = 16  # learned tokens in the text-like prefix
    rope_dims: tuple[int, int, int] = (16, 24, 24)
    rope_theta: float = 256.0
    actions: int = 81  # 9 * translation + rotation
    chunk: int = 4  # frames generated together
    steps: int = 4  # denoising steps
    shift: float = 3.0  # of the flow-matching schedule
    context_time: float = 14.0  # timestep label of clean context frames

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def text_tokens(self) -> int:
        return self.registers + (self.height // 2) * (self.width // 2)


def sigmas(config: WorldConfig, steps: int | None = None) -> list[float]:
    """Noise levels of the sampler, ``steps + 1`` falling values from 1 to 0 (shifted linear flow-matching schedule)."""
    n = steps or config.steps
    line = [1 - i / n for i in range(n + 1)]
    return [config.shift * s / (1 + (config.shift - 1) * s) for s in line]


def sinusoid(t: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal embedding of timesteps: any shape -> [..., dim], float32."""
    half = dim // 2
    freqs = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10_000.0) / half))
    angles = t.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(config: WorldConfig, frames: int, start: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [frames * height * width, head_dim], for frames at temporal indices start, start + 1, ..."""
    axes = (
        torch.arange(frames, device=device, dtype=torch.float32) + start,
        torch.arange(config.height, device=device, dtype=torch.float32),
        torch.arange(config.width, device=device, dtype=torch.float32),
    )
    grids = torch.meshgrid(*axes, indexing="ij")
    angles = []
    for grid, dim in zip(grids, config.rope_dims):
        freqs = config.rope_theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        angles.append((grid.reshape(-1, 1) * freqs).repeat_interleave(2, dim=1))
    angle = torch.cat(angles, dim=1)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [B, L, H, D] by the table [L, D]; computed in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x.float() * cos[:, None, :] + turned * sin[:, None, :]).to(x.dtype)


def camera_matrices(w2c: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """PRoPE's projections P = K w2c and their inverses, each [B, F, 4, 4], from w2c [B, F, 4, 4] and K [B, 3, 3].

    The principal point is left out, as upstream does; K is normalised by the image size.
    """
    # Element-wise on purpose: autocast would round a matmul of the translations to bf16.
    focal = torch.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1]], dim=-1)
    scale = torch.cat([focal, torch.ones_like(focal)], dim=-1)[:, None]  # [B, 1, 4], the diagonal of K lifted to 4 x 4
    rotation = w2c[..., :3, :3].transpose(-1, -2)
    translation = -(rotation * w2c[..., None, :3, 3]).sum(-1, keepdim=True)
    c2w = torch.cat([torch.cat([rotation, translation], -1), w2c[..., 3:, :]], -2)
    return scale[..., None] * w2c, c2w / scale[..., None, :]


def apply_camera(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply each group of four channels of x [B, F*S, H, D] by its frame's matrix [B, F, 4, 4]."""
    groups = x.unflatten(1, (matrix.shape[1], -1)).unflatten(-1, (-1, 4))  # [B, F, S, H, D / 4, 4]
    # A sum of products, not a matmul: four columns are no work for a GEMM, and this fuses with what stands around it.
    product = matrix[:, :, None, None, None].to(x.dtype) * groups[..., None, :]
    return product.sum(-1).flatten(-2).flatten(1, 2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class TextBlock(nn.Module):
    """One block of the narrow prefix stream; it also gives the keys and values that the vision stream attends to."""

    def __init__(self, config: WorldConfig):
        super().__init__()
        dim = config.text_dim
        self.heads, self.vision_heads = 2, config.heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(approximate="tanh"), nn.Linear(3 * dim, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_kv = nn.Linear(dim, 2 * config.dim)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm1(x)
        k, v = self.to_kv(h).unflatten(-1, (self.vision_heads, -1)).transpose(1, 2).chunk(2, dim=-1)
        q_text, k_text, v_text = self.qkv(h).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q_text, k_text, v_text).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), self.k_norm(k), v


class Prefix(nn.Module):
    """The text-like prefix: pooled tokens of the prompt image and learned registers, through their own stream."""

    def __init__(self, config: WorldConfig):
        super().__init__()
        self.embed = nn.Linear(config.channels, config.text_dim)
        self.position = nn.Parameter(torch.randn(config.text_tokens - config.registers, config.text_dim) * 0.02)
        self.registers = nn.Parameter(torch.randn(config.registers, config.text_dim) * 0.02)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt image latent [B, C, H, W] -> keys and values, each [depth, B, heads, text_tokens, head_dim]."""
        tokens = self.embed(F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)) + self.position
        x = torch.cat([self.registers.expand(image.shape[0], -1, -1), tokens], dim=1)
        keys, values = [], []
        for block in self.blocks:
            x, k, v = block(x)
            keys.append(k)
            values.append(v)
        return torch.stack(keys), torch.stack(values)


class VisionBlock(nn.Module):
    """Modulated attention over [text | context | current] in a RoPE and a PRoPE branch, then an MLP."""

    def __init__(self, config: WorldConfig):
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.modulation = nn.Linear(config.cond_dim, 6 * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.out = nn.Linear(dim, dim)
        self.camera_out = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(dim, config.mlp_ratio * dim), nn.GELU(approximate="tanh"),
                                 nn.Linear(config.mlp_ratio * dim, dim))

    def project(self, x: Tensor, vec: Tensor, cos: Tensor, sin: Tensor, camera: Tensor, inverse: Tensor):
        """Modulation and q, k, v of both branches, stacked on the batch axis: [2B, heads, L, head_dim]."""
        modulation = self.modulation(F.silu(vec)).chunk(6, dim=-1)
        h = modulate(self.norm1(x), modulation[0], modulation[1])
        q, k, v = self.qkv(h).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)  # each [B, L, heads, head_dim]
        q, k = self.q_norm(q), self.k_norm(k)
        q = torch.cat([apply_rope(q, cos, sin), apply_camera(camera.transpose(-1, -2), q)], dim=0).transpose(1, 2)
        k = torch.cat([apply_rope(k, cos, sin), apply_camera(inverse, k)], dim=0).transpose(1, 2)
        v = torch.cat([v, apply_camera(inverse, v)], dim=0).transpose(1, 2)
        return modulation, q, k, v

    def finish(self, x: Tensor, attended: Tensor, modulation, camera: Tensor) -> Tensor:
        rope, prope = attended.transpose(1, 2).flatten(2).chunk(2, dim=0)
        prope = apply_camera(camera, prope.unflatten(-1, (self.heads, -1))).flatten(2)
        x = x + modulation[2] * (self.out(rope) + self.camera_out(prope))
        return x + modulation[5] * self.mlp(modulate(self.norm2(x), modulation[3], modulation[4]))

    def forward(self, x: Tensor, vec: Tensor, cos: Tensor, sin: Tensor, camera: Tensor, inverse: Tensor,
                text_k: Tensor, text_v: Tensor, context_k: Tensor | None = None, context_v: Tensor | None = None):
        """x [B, L, C] with everything it attends to; returns x and this call's own keys and values [2B, H, L, D]."""
        modulation, q, k, v = self.project(x, vec, cos, sin, camera, inverse)
        keys, values = k, v
        if context_k is not None:
            keys, values = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)
        keys = torch.cat([text_k.repeat(2, 1, 1, 1), keys], dim=2)
        values = torch.cat([text_v.repeat(2, 1, 1, 1), values], dim=2)
        attended = F.scaled_dot_product_attention(q, keys, values)
        return self.finish(x, attended, modulation, camera), k, v


class WorldModel(nn.Module):
    """Velocity of noisy latent frames, given a prefix, context keys and values, cameras and actions."""

    def __init__(self, config: WorldConfig = WorldConfig(), regional: bool = True):
        """regional: mark the blocks as one region that ``torch.compile`` compiles once and calls depth times."""
        super().__init__()
        self.config = config
        dim, cond = config.dim, config.cond_dim
        self.prefix = Prefix(config)
        self.patch = nn.Conv3d(2 * config.channels + 1, dim, 1)
        self.time = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.action = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.final_modulation = nn.Linear(cond, 2 * dim)
        self.final = nn.Linear(dim, config.channels)
        self.run_block = torch.compiler.nested_compile_region(run_block) if regional else run_block

    def initialise(self) -> None:
        """Zero the gates and the output, so that training starts at the identity (not for tests: zeros prove nothing)."""
        for layer in [*(b.modulation for b in self.blocks), self.final_modulation, self.final]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def embed(self, x: Tensor, timestep: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, F*H*W, C] and the conditioning vector, stretched over each frame's tokens as upstream does."""
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        # The sinusoids are float32; without autocast (a model in bfloat16) the layers take their weights' dtype only.
        vec = self.time(sinusoid(timestep).to(tokens.dtype)) + self.action(sinusoid(action).to(tokens.dtype))
        return tokens, vec.repeat_interleave(self.config.height * self.config.width, dim=1)

    def unpatchify(self, tokens: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.final_modulation(F.silu(vec)).chunk(2, dim=-1)
        out = self.final(modulate(self.final_norm(tokens), shift, scale))
        return out.unflatten(1, (-1, self.config.height, self.config.width)).permute(0, 4, 1, 2, 3)

    def forward(self, x: Tensor, timestep: Tensor, action: Tensor, w2c: Tensor, intrinsics: Tensor, text_k: Tensor,
                text_v: Tensor, context: tuple[list[Tensor], list[Tensor]] | None = None, start: int = 0):
        """One vision forward: a context prefill (no context given, its keys and values kept) or a denoising step.

        x [B, 2C+1, F, H, W] latents, prompt latents and prompt mask on the channel axis; timestep, action [B, F];
        w2c [B, F, 4, 4] world to camera; intrinsics [B, 3, 3] normalised by the image size; text_k, text_v as given
        by ``prefix``; context: keys and values of the context, one [2B, heads, N*H*W, head_dim] a block; start: the
        temporal RoPE index of the first frame. Returns velocity [B, C, F, H, W] and this call's keys and values.
        """
        tokens, vec = self.embed(x, timestep, action)
        cos, sin = rope_table(self.config, x.shape[2], start, x.device)
        camera, inverse = camera_matrices(w2c, intrinsics)
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            past = (context[0][i], context[1][i]) if context is not None else (None, None)
            tokens, k, v = self.run_block(block, tokens, vec, cos, sin, camera, inverse, text_k[i], text_v[i], *past)
            keys.append(k)
            values.append(v)
        return self.unpatchify(tokens, vec), (keys, values)


def run_block(block: VisionBlock, *args):
    return block(*args)


class ChunkSampler(nn.Module):
    """The whole chunk as one function, and so one graph: context prefill, then the denoising loop (Euler).

    This is what a user compiles: ``torch.compile(ChunkSampler(model), backend="light_interaction")``.
    """

    def __init__(self, model: WorldModel, steps: int | None = None, mark: bool = False):
        """mark: note in ``timing`` when the context's keys and values exist, so that prefill and denoising are timed apart."""
        super().__init__()
        self.model = model
        self.sigmas = sigmas(model.config, steps)
        self.mark = mark
        if mark:
            from . import timing  # noqa: F401  (registers the operator)

    def forward(self, noise: Tensor, prompt: Tensor, action: Tensor, w2c: Tensor, intrinsics: Tensor, text_k: Tensor,
                text_v: Tensor, context_latents: Tensor | None = None, context_action: Tensor | None = None,
                context_w2c: Tensor | None = None) -> Tensor:
        """Denoise one chunk.

        noise [B, C, 4, H, W]; prompt [B, C+1, 4, H, W] given latents and their mask; action [B, 4]; w2c [B, 4, 4, 4];
        intrinsics [B, 3, 3]; text_k, text_v from ``model.prefix``; context_*: clean latents [B, C, N, H, W], actions
        [B, N] and cameras [B, N, 4, 4] of the N context frames, in temporal order. Returns latents [B, C, 4, H, W].
        """
        context, start = None, 0
        if context_latents is not None:
            start = context_latents.shape[2]
            blank = torch.zeros_like(context_latents[:, :1]).expand(-1, prompt.shape[1], -1, -1, -1)
            label = torch.full_like(context_action, self.model.config.context_time, dtype=torch.float32)
            _, context = self.model(torch.cat([context_latents, blank], dim=1), label, context_action, context_w2c,
                                    intrinsics, text_k, text_v)
        x = noise
        if self.mark and context is not None:
            # The last block's are made last. Keeping all alive in one place would cost what is to be measured.
            x = torch.ops.doom_world.mark([context[0][-1], context[1][-1]], x)
        for sigma, following in zip(self.sigmas[:-1], self.sigmas[1:]):
            time = torch.full_like(action, 1000 * sigma, dtype=torch.float32)
            velocity, _ = self.model(torch.cat([x, prompt], dim=1), time, action, w2c, intrinsics, text_k, text_v,
                                     context, start)
            x = x + velocity * (following - sigma)
        return x
