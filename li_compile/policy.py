"""What a chunk attends to and whether its denoising steps are reused, decided on the host before its first step.

Pure functions: poses and the state of the chunk before in, a plan out. The policies stand in ``li_compile.policies``;
what is common to all of them is here.
"""

from __future__ import annotations

from typing import Any

import torch

from li_compile.config import Config, ContextConfig
from li_compile.errors import PoseError
from li_compile.policies import RELEASED, SELECTORS
from li_compile.policies.base import Choice, ChunkPlan, PolicyState, Scene
from li_compile.policies.gates import held, is_revisit, jumps
from li_compile.policies.poses import check_poses
from li_compile.policies.window import latent_change, smoothed, window_length

__all__ = ["ChunkPlan", "PolicyState", "check_chunks", "check_poses", "dynamics_unit", "latent_change", "plan_checked", "plan_context"]


def plan_context(history_w2c: Any, current_w2c: Any, config: Config, *, state: PolicyState = PolicyState(),
                 change: float | None = None, depth: torch.Tensor | None = None) -> ChunkPlan:
    """Choose the context of the chunk with poses ``current_w2c`` out of the latents before it.

    Args:
        history_w2c: ``[N, 4, 4]`` rigid world-to-camera matrices, one a latent, oldest first; N a multiple of
            ``context.chunk_frames``, 0 included. A tensor or anything that ``torch.as_tensor`` takes. It may be all
            latents so far or those that another selection already left of them, the newest ones among them.
        current_w2c: ``[Q, 4, 4]`` likewise for the chunk to be generated; Q a positive multiple.
            With policy "slots" both are poses of video frames, of any number.
        config: its ``context`` and ``cache`` parts are read.
        state: ``plan.state`` of the chunk before, for hysteresis and smoothing.
        change: D_t of eq. 1 (:func:`latent_change`), for ``context.window = "dynamics"``; None: not known.
        depth: ``[N, h, w]`` depth maps of the history, for rule "frustum": what lies behind surfaces was not seen.

    With ``context`` disabled the whole history is kept and scored all the same, for the cache. Steps are reused if the
    score reaches ``cache.threshold``, and, but with the released policies, only on known ground (``plan.revisit``).

    Raises:
        PoseError: a shape, a count that fits no whole chunk, a pose that is not finite or not rigid; names the frame.

    Source: Light Interaction section 3.1 and eq. 5-8.
    """
    history, current = check_chunks(history_w2c, current_w2c, config)
    return plan_checked(history, current, config, state=state, change=change, depth=depth)


def check_chunks(history_w2c: Any, current_w2c: Any, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as :func:`check_poses` returns them, of whole chunks but for memory slots. Raises PoseError."""
    multiple = 1 if config.context.policy == "slots" else config.context.chunk_frames
    return check_poses(history_w2c, "history", multiple=multiple), check_poses(current_w2c, "current", multiple=multiple)


def plan_checked(history: torch.Tensor, current: torch.Tensor, config: Config, *, state: PolicyState = PolicyState(),
                 change: float | None = None, depth: torch.Tensor | None = None, since_jump: int | None = None) -> ChunkPlan:
    """:func:`plan_context` for poses that :func:`check_poses` returned.

    since_jump: history latents after the last teleport; None: looked for only between history and current chunk, since
    a history that was selected jumps wherever something was left out.
    """
    context, count = config.context, len(history)
    if len(current) == 0:
        raise PoseError("the current chunk has no poses; give one world-to-camera matrix for each of its latents")
    if depth is not None and len(depth) != count:
        raise PoseError(f"{len(depth)} depth maps for {count} history poses; give one a latent, or none")
    if count == 0:
        return ChunkPlan((), False, 0.0, {}, "no history", 0, state=state)

    released = context.policy in RELEASED
    if since_jump is None:
        jumped = not released and len(jumps(torch.cat((history[-1:], current[:1])), context.teleport * context.radius)) > 0
        since_jump = 0 if jumped else count
    teleported = not released and since_jump == 0
    if teleported:
        state, change = PolicyState(), None
    state, longest = _window(context, state, change)
    window = min(longest, count) if released else min(longest, count, since_jump)

    scene = Scene(history, current, context, window, state, depth)
    choice = SELECTORS[context.policy].choose(scene) if context.enabled else _everything(scene)
    reuse = _reuse(choice, config, state)
    memory = state.memory if choice.memory is None else choice.memory
    reason = choice.reason + ("; the camera jumped, nothing is kept for being new" if teleported else "")
    return ChunkPlan(choice.indices, reuse, choice.score, choice.scores, reason, count, window, choice.coverage, choice.revisit,
                     choice.slots, teleported, PolicyState(memory, reuse if choice.scores else state.reuse, state.dynamics))


def dynamics_unit(context: ContextConfig) -> int:
    """Latents of a unit of eq. 1 to 3."""
    return context.chunk_frames if context.dynamics_unit == "chunk" else 1


def _window(context: ContextConfig, state: PolicyState, change: float | None) -> tuple[PolicyState, int]:
    """State with the newest change smoothed in, and the temporal window in latents."""
    if context.window == "fixed":
        return state, context.temporal_frames
    if change is not None:
        state = PolicyState(state.memory, state.reuse, smoothed(state.dynamics, change, context.alpha))
    unit = dynamics_unit(context)
    if state.dynamics is None or context.temporal_frames < unit:
        return state, context.temporal_frames
    return state, unit * window_length(state.dynamics, context.kappa, context.temporal_frames // unit)


def _everything(scene: Scene) -> Choice:
    """All of the history, and the score for the cache: of the candidates that upstream's window leaves."""
    context, everything = scene.context, tuple(range(scene.count))
    if scene.count < context.memory_frames:
        return Choice(everything, f"all kept: {scene.count} latents so far, pruning starts at {context.memory_frames}")
    scores = scene.chunk_scores(range(context.anchor_frames, scene.count - context.temporal_frames, context.chunk_frames))
    best = max(scores.values(), default=0.0)
    revisit = is_revisit(scene, best) if scores and context.policy not in RELEASED else None
    return Choice(everything, "all kept: context pruning is off", None, best, scores, revisit=revisit)


def _reuse(choice: Choice, config: Config, state: PolicyState) -> bool:
    if not (config.cache.enabled and choice.scores) or choice.revisit is False:
        return False
    slack = 0.0 if config.context.policy in RELEASED else config.context.hysteresis
    return held(choice.score, config.cache.threshold, state.reuse, slack)
