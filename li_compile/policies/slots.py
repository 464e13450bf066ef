"""Matrix-Game-3.0's memory slots, with the pruning that Light Interaction adds to them."""

from __future__ import annotations

import dataclasses

from li_compile.errors import PoseError

from .base import Choice, Scene

__all__ = ["SlotPolicy"]


class SlotPolicy:
    """A fixed number of memory slots, each filled with the history pose that sees most of one reference pose.

    The references are the current poses at ``slot_references`` from the end (1: the last). A slot takes the history
    pose with the highest overlap, the first of equals, pose 0 excepted; without de-duplication. The last slot then holds
    ``slot_sink`` whatever it found. A slot is kept if its overlap reaches ``threshold``; the sink is always kept.
    With ``slot_repeats`` "drop", a latent that several slots were filled with is kept once, in the first of them or in the sink.

    ``temporal_frames`` of the newest poses follow the slots and are not candidates; Matrix-Game has none here, since its
    past frames belong to the window that is generated.

    What gates step reuse is the worst of all overlaps, the sink's own find included: the released code takes the
    minimum where the paper's equation 6 takes the maximum.

    Matrix-Game's poses are video frames, not latents: ``history`` is all before the window that is generated, ``current``
    the whole window, past frames included. ``ChunkPlan.indices`` are frames then; its latent of frame f is
    ``(f - 1) // 4 + 1``, and of frame 0 it is 0. Overlap by rule "grid" with radius 30 reproduces it.

    Source: Matrix-Game-3.0 ``select_memory_idx_fov`` and its interactive pipeline; the released patch to it.
    """

    def choose(self, scene: Scene) -> Choice:
        context, recent = scene.context, scene.count - scene.window
        if max(context.slot_references) > len(scene.current):
            raise PoseError(f"the current window has {len(scene.current)} poses, and context.slot_references reach back to the "
                            f"{max(context.slot_references)}th from its end; give the whole window or nearer references")
        if recent < 2:
            return Choice(tuple(range(scene.count)), f"no memory: {scene.count} poses before this window, slots need {2 + scene.window}")
        references = [len(scene.current) - r for r in context.slot_references]
        narrow = dataclasses.replace(scene, current=scene.current[references])
        best, frame = narrow.overlap(range(1, recent)).max(1)
        frames, scores = (frame + 1).tolist(), dict(enumerate(best.tolist()))
        last = len(frames) - 1
        frames[last] = min(context.slot_sink, recent - 1)
        slots = tuple(k for k in range(last + 1) if k == last or scores[k] >= context.threshold)
        if context.slot_repeats == "drop":
            latent = lambda k: (frames[k] + 3) // 4
            slots = tuple(k for i, k in enumerate(slots) if k == last or latent(k) not in {latent(j) for j in (*slots[:i], last)})
        found = ", ".join(f"{score:.2f}" for score in scores.values())
        reason = f"{len(slots)} of {len(frames)} slots kept (overlaps {found}; threshold {context.threshold:g}, the last is the sink)"
        kept = (*(frames[k] for k in slots), *range(recent, scene.count))
        return Choice(kept, reason, None, min(scores.values()), scores, slots=slots)
