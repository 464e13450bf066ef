"""The default policy: few single latents that together saw most of what the camera is about to see, some of it twice."""

from __future__ import annotations

import numpy as np
import torch

from .base import Choice, Scene
from .gates import MARGIN

__all__ = ["CoveragePolicy"]

SAMPLES = 256  # points of a current view: of a chunk of four, 1024
REPEAT = 0.25  # worth of seeing a point once more, over the worth of seeing it the time before; a power of two, so sums are exact
POOL = 16  # latents that are looked at closely, however long the history is


class CoveragePolicy:
    """Greedy cover of the current views by single latents; on new ground with the anchor.

    The newest ``temporal_frames`` are kept and, on new ground, the oldest ``anchor_frames``. Then, one at a time, the
    latent is taken that adds most: that saw most points of the current views, a point that k of those taken saw counting
    ``REPEAT ** k``; of equals, the oldest. Lengths are whole multiples of ``chunk_frames``: what was begun is filled, a further
    multiple follows only if its latents add ``min_gain`` of the views together, counted in the same way, up to
    ``memory_frames``. A history of one chunk is kept whole.

    What a latent adds counts, not what it overlaps: of the newest chunk, whose latents mostly saw the same, one or two may
    be enough, and an old latent is retrieved where it shows something that the newest do not. That a second look still
    counts is what the model wants (docs/context.md): with first looks alone, it is given the edges of a view from latents that
    saw little else. The oldest of equals has been through the model least often, and carries the least drift. New ground,
    where no old chunk is as near as the newest one, has nothing like it to retrieve; there the anchor takes its place, without
    which a model that is left to its own newest frames drifts away in brightness and colour.

    Only ``POOL`` latents are looked at: the newest, the anchor, and the chunks whose cameras stand and look most like the
    current ones. So a chunk late in a long history costs no more than an early one.
    """

    def choose(self, scene: Scene) -> Choice:
        context, count, step = scene.context, scene.count, scene.context.chunk_frames
        if count <= step:
            return Choice(tuple(range(count)), f"all kept: {count} latents so far")
        pool = _shortlist(scene)
        views = scene.seen(pool, SAMPLES).transpose(0, 1).flatten(1).numpy()  # [P, points]
        overlap = views.mean(1)

        position, half = {frame: i for i, frame in enumerate(pool)}, step // 2
        score = lambda start: float(overlap[position[start]] + overlap[position[start + half]]) / 2
        whole = [f for f in pool if f % step == 0 and f + half in position and f + step <= count]
        scores = {start: score(start) for start in whole if start <= count - 2 * step}
        best = max(scores.values(), default=0.0)
        slack = context.hysteresis if scene.state.memory else 0.0
        known = bool(scores) and best >= score(count - step) - MARGIN - slack

        anchor = 0 if known else context.anchor_frames
        forced = [i for i, frame in enumerate(pool) if frame < anchor or frame >= count - scene.window]
        taken, covered = _cover(views, forced, context.memory_frames, step, context.min_gain)
        chosen = sorted(pool[i] for i in taken)
        reason = f"{'known' if known else 'new'} ground: {len(chosen)} latents cover {covered:.0%} of the view, " \
                 f"{sum(frame < count - step for frame in chosen)} of them older than the newest chunk"
        return Choice(tuple(chosen), reason, known, best, scores, covered, known if scores else None)


def _cover(views: np.ndarray, forced: list[int], most: int, step: int, min_gain: float) -> tuple[list[int], float]:
    """Which rows of ``views`` [P, points] to take, and the share of points that these saw. On numpy, whose small operations
    cost a third of torch's."""
    taken, seen = list(forced), views.astype(np.float64)
    worth = REPEAT ** seen[taken].sum(0)  # of each point, to the next that sees it
    most = min(most, len(views) // step * step)
    older = -1e-12 * np.arange(len(views))
    while len(taken) < most:
        bucket, rest = list(taken), worth
        for _ in range(step - len(taken) % step):
            gain = seen @ rest + older
            gain[bucket] = -1.0
            bucket.append(int(gain.argmax()))
            rest = np.where(views[bucket[-1]], REPEAT * rest, rest)
        gained = (worth - rest).sum() / (1 - REPEAT)
        if taken and len(taken) % step == 0 and gained < min_gain * worth.size:
            break
        taken, worth = bucket, rest
    return taken, float(views[taken].any(0).mean())


def _shortlist(scene: Scene) -> list[int]:
    """The latents to look at, ascending: all of a short history, else whole chunks, nearest in place and direction first."""
    context, count, step = scene.context, scene.count, scene.context.chunk_frames
    if count <= POOL:
        return list(range(count))
    current = scene.current[len(scene.current) // 2]
    here = torch.cat((-(current[:3, :3].T @ current[:3, 3]), current.new_ones(1)))  # the current camera's centre
    apart = torch.linalg.vector_norm(scene.history[:, :3] @ here, dim=-1)  # from each history camera
    alike = scene.history[:, 2, :3] @ current[2, :3]  # cosine of the angle between the forward axes
    nearness = (alike - apart / (2 * context.radius))[: count // step * step].view(-1, step).sum(1)
    newest = count - max(step, scene.window)
    kept = {*range(min(context.anchor_frames, count)), *range(newest, count)}
    for chunk in nearness.argsort(descending=True, stable=True).tolist():
        if len(kept) + step > POOL:
            break
        kept.update(range(chunk * step, (chunk + 1) * step))
    return sorted(kept)
