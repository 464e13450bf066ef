"""Upstream's interactive pipeline, compiled: eight clips of a walk there and back.

    python -m examples.matrix_game_3.example Matrix-Game/Matrix-Game-3 --size real --device cuda

With upstream's released weights, build its ``MatrixGame3Pipeline`` as its ``generate.py`` does and give that to ``li_compile.compile``.
"""

from __future__ import annotations

import torch
import typer

import li_compile

from .upstream import load, there_and_back


def main(upstream: str, size: str = "tiny", device: str = "cpu", clips: int = 8, preset: str = "all", lowering: str = "inductor") -> None:
    options = {"preset": preset, "lowering": lowering, "context.policy": "slots", "cache.threshold": 0.45}
    options |= {"sparse.tile": (4, 2, 2), "sparse.block_size": 16} if size == "tiny" else {}
    with torch.no_grad(), load(upstream, device, pipeline=True) as code:
        pipeline, latents = code.rollout(code.make(size), size)
        compiled = li_compile.compile(pipeline, li_compile.Config.from_options(options))
        code.play(compiled, there_and_back("walk", clips), size)
        print(compiled.report())
        stats = compiled.rollout.session.stats()
        for clip, (chunk, made) in enumerate(zip(stats["per_chunk"], latents)):
            print(f"clip {clip}: {tuple(made.shape)}, {chunk['context_kept']} memory latents, {chunk['calls']} of 3 calls. {chunk['reason']}")
        compiled.detach()


if __name__ == "__main__":
    typer.run(main)
