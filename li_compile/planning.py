"""The planning side of a session: poses, finished latents, and the state that decisions hand from chunk to chunk."""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

import torch

from li_compile.config import Config
from li_compile.errors import PoseError
from li_compile.policies import RELEASED
from li_compile.policies.base import ChunkPlan, PolicyState
from li_compile.policies.gates import jumps
from li_compile.policies.poses import check_poses
from li_compile.policy import check_chunks, dynamics_unit, latent_change, plan_checked

__all__ = ["Planner"]


class Planner:
    """What a session knows of its trajectory, and the plans that follow from it.

    A plan depends on the poses, on what was observed of the latents, and on the plans of the chunks before it (hysteresis,
    smoothing); never on how often or in which order plans were asked for: what is missing is planned first.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.reset()

    def reset(self) -> None:
        self.poses = torch.empty(0, 4, 4, dtype=torch.float64)
        self.teleports: list[int] = []  # latents at which the camera stands far from where it was
        self.changes: dict[int, float] = {}  # first latent of a chunk -> D_t known before it (eq. 1)
        self.depth: dict[int, torch.Tensor] = {}  # latent -> depth map
        self._after: dict[int, PolicyState] = {}  # first latent of a chunk -> state that the chunk before left
        self._plans: dict[tuple[int, int], ChunkPlan] = {}
        self._last: tuple[tuple, PolicyState, PolicyState] | None = None  # see decide()

    def extend(self, w2c: Any) -> None:
        """Append poses, ``[n, 4, 4]`` or one ``[4, 4]``. Raises PoseError; nothing is appended then."""
        if getattr(w2c, "ndim", None) == 2:
            w2c = w2c[None]
        known = len(self.poses)
        added = check_poses(w2c, "added", first=known)
        context = self.config.context
        if context.policy not in RELEASED:
            stretch = torch.cat((self.poses[-1:], added))
            self.teleports += (jumps(stretch, context.teleport * context.radius) + known - min(known, 1)).tolist()
        self.poses = torch.cat((self.poses, added))

    def observe(self, latents: torch.Tensor | None, dim: int, depth: torch.Tensor | None, end: int) -> None:
        """Note the newest finished latents, frames along ``dim``, the last of them latent ``end - 1``; and depth maps."""
        if latents is not None:
            change = latent_change(latents, dim, dynamics_unit(self.config.context))
            if change is not None:
                self.changes[end] = change
        if depth is not None:
            for i, one in enumerate(depth.detach().cpu(), start=end - len(depth)):
                self.depth[i] = one
        for known in [start for start in self._after if start > end]:  # they were planned without it
            del self._after[known]
        self._plans = {key: plan for key, plan in self._plans.items() if key[0] < end}

    def plan(self, start: int, size: int) -> ChunkPlan:
        """The plan of latents ``start ... start + size - 1``."""
        if start < 0 or size < 1:
            raise PoseError(f"no such chunk: start {start}, size {size}; start counts latents from 0")
        if start + size > len(self.poses):
            raise PoseError(
                f"latents {start} to {start + size - 1} need poses, {len(self.poses)} are known; "
                "call extend() with the chunk's poses before plan()"
            )
        if (start, size) not in self._plans:
            self._plans[start, size] = self._decide(start, size)
        return self._plans[start, size]

    def _decide(self, start: int, size: int) -> ChunkPlan:
        context = self.config.context
        if context.policy != "slots" and (start % context.chunk_frames or size % context.chunk_frames):
            check_chunks(self.poses[:start], self.poses[start : start + size], self.config)  # raises, as for poses from elsewhere
        last = self.teleports[i - 1] if (i := bisect.bisect_right(self.teleports, start)) else 0
        depth = torch.stack([self.depth[i] for i in range(start)]) if start and all(i in self.depth for i in range(start)) else None
        plan = plan_checked(self.poses[:start], self.poses[start : start + size], self.config, state=self._state(start, size),
                            change=self.changes.get(start), depth=depth, since_jump=start - last)
        self._after[start + size] = plan.state
        return plan

    def _state(self, start: int, size: int) -> PolicyState:
        """What the chunk before ``start`` left, planning the chunks in between that nobody asked for."""
        if self.config.context.policy in RELEASED and self.config.context.window == "fixed":
            return PolicyState()
        first = start
        while first > 0 and first not in self._after and first - size >= 0:
            first -= size
        for chunk in range(first, start, size):
            self.plan(chunk, size)
        return self._after.get(start, PolicyState())

    def decide(self, history: torch.Tensor, current: torch.Tensor, config: Config, change: float | None = None) -> ChunkPlan:
        """Plan a chunk whose poses come with a graph's inputs, after the chunk that came before it here.

        The same inputs again are the same chunk again, run twice: it is planned after the same state.
        """
        history, current = check_chunks(history, current, config)
        given, before = (history, current, change), PolicyState()
        if self._last is not None:
            (h, c, d), *states = self._last
            before = states[0 if d == change and torch.equal(h, history) and torch.equal(c, current) else 1]
        plan = plan_checked(history, current, config, state=before, change=change)
        self._last = given, before, plan.state
        return plan

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain data."""
        state = dataclasses.asdict
        last = None if self._last is None else {"given": self._last[0], "before": state(self._last[1]), "after": state(self._last[2])}
        return {"poses": self.poses.clone(), "teleports": list(self.teleports), "changes": dict(self.changes),
                "depth": {i: d.clone() for i, d in self.depth.items()},
                "after": {start: state(s) for start, s in self._after.items()}, "last": last}

    def load_state_dict(self, given: dict[str, Any]) -> None:
        self.reset()
        self.poses, self.teleports = given["poses"].clone(), list(given["teleports"])
        self.changes, self.depth = dict(given["changes"]), dict(given["depth"])
        self._after = {start: PolicyState(**s) for start, s in given["after"].items()}
        if (last := given["last"]) is not None:
            self._last = tuple(last["given"]), PolicyState(**last["before"]), PolicyState(**last["after"])
