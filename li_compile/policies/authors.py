"""The released selection of Light Interaction for HY-WorldPlay, reproduced."""

from __future__ import annotations

from .base import Choice, Scene

__all__ = ["AuthorsPolicy"]


class AuthorsPolicy:
    """Anchor, window, and whole retrieved chunks or none, by one gate over all.

    Anchor latents and the window are kept. Every whole chunk between them is a candidate, scored by view overlap. If the
    best score reaches ``threshold``, candidates are kept best first until ``memory_frames`` is full, else none is.
    A history shorter than ``memory_frames`` is kept whole and not scored. No hysteresis, no look at novelty.

    Its plans are those of the released code, but for its random points: on "left-31, right-32" 148 context latents, on
    "w-31, s-32" 168.

    The history may be all latents so far or what upstream's retrieval already chose from them (anchor chunk, the one
    candidate of best overlap, the newest 12 latents): the plan is the same up to the positions' numbering, as long as
    ``memory_frames - temporal_frames`` leaves room for one retrieved chunk, as all presets do. The reason: a plan uses
    the best candidate only. The candidates here are all chunks older than our temporal window, L latents; upstream's
    are those older than 12. So the best of ours either is upstream's best, which is among those given, or lies
    between the two windows, and all of that is given too. Upstream starts to choose at more than 20 latents only.

    Source: paper section 3.1 eq. 4; released ``select_aligned_memory_frames``.
    """

    def choose(self, scene: Scene) -> Choice:
        context, count = scene.context, scene.count
        if count < context.memory_frames:
            return Choice(tuple(range(count)), f"all kept: {count} latents so far, pruning starts at {context.memory_frames}")
        recent = count - scene.window
        scores = scene.chunk_scores(range(context.anchor_frames, recent, context.chunk_frames))
        best = max(scores.values(), default=0.0)
        kept = {*range(context.anchor_frames), *range(recent, count)}
        memory = bool(scores) and best >= context.threshold
        if not scores:
            reason = "anchor and recent latents fill the history: no candidates"
        elif not memory:
            reason = f"retrieved chunks dropped: best view overlap {best:.3f} is below {context.threshold:g}"
        else:
            for start in sorted(scores, key=scores.__getitem__, reverse=True):  # stable: the older of two equals goes first
                if len(kept) >= context.memory_frames:
                    break
                kept.update(range(start, start + context.chunk_frames))
            reason = f"retrieved by view overlap, best {best:.3f} (threshold {context.threshold:g})"
        return Choice(tuple(sorted(kept)), reason, memory, best, scores)
