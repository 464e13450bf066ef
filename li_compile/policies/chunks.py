"""Per-chunk gating: each retrieved chunk stands on its own score."""

from __future__ import annotations

from .base import Choice, Scene
from .gates import held, is_revisit

__all__ = ["ChunkPolicy"]


class ChunkPolicy:
    """Anchor, window, and every candidate chunk whose own view overlap reaches ``threshold``, best first, as long as
    ``memory_frames`` holds them. A history that fits into ``memory_frames`` is still gated.

    Unlike the authors' gate, a good chunk does not bring bad ones along, and several good ones are kept where there is
    room. Hysteresis: after a chunk with memory, ``threshold - hysteresis`` is enough.
    """

    def choose(self, scene: Scene) -> Choice:
        context, count = scene.context, scene.count
        recent = count - scene.window
        anchor = min(context.anchor_frames, recent)
        scores = scene.chunk_scores(range(anchor, recent - context.chunk_frames + 1, context.chunk_frames))
        best = max(scores.values(), default=0.0)
        kept, chosen = {*range(anchor), *range(recent, count)}, []
        for start in sorted(scores, key=scores.__getitem__, reverse=True):
            fits = len(kept) + context.chunk_frames <= context.memory_frames
            if not fits or not held(scores[start], context.threshold, scene.state.memory, context.hysteresis):
                break
            chosen.append(start)
            kept.update(range(start, start + context.chunk_frames))
        bar = context.threshold - (context.hysteresis if scene.state.memory else 0.0)
        if not scores:
            reason = "anchor and recent latents fill the history: no candidates"
        else:
            reason = f"{len(chosen)} of {len(scores)} chunks kept, each on its own overlap (best {best:.3f}, threshold {bar:g})"
        revisit = is_revisit(scene, best) if scores else None
        return Choice(tuple(sorted(kept)), reason, bool(chosen) if scores else None, best, scores, revisit=revisit)
