"""What outlives a chunk of one rollout: the poses seen so far, and what was decided and spent."""

from __future__ import annotations

import contextvars
import dataclasses
import pathlib
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from li_compile import saving
from li_compile.config import Config
from li_compile.errors import LightInteractionError
from li_compile.memory import Kept
from li_compile.planning import Planner
from li_compile.policy import ChunkPlan

if TYPE_CHECKING:
    from li_compile.scope import ChunkScope

__all__ = ["Session"]

# A tuple, never changed in place: each thread and each asyncio task sees the sessions that it entered itself.
_active: contextvars.ContextVar[tuple[Session, ...]] = contextvars.ContextVar("li_compile_sessions", default=())


@dataclasses.dataclass(frozen=True)
class _Record:
    plan: ChunkPlan
    steps: int | None
    calls: int | None
    info: dict[str, Any]


class Session:
    """State of one rollout. Make one a video; as a context manager it is the active session of its thread or task.

    ::

        with li_compile.Session(li_compile.Config(preset="all")) as session:
            session.extend(w2c)                         # poses, all at once or chunk by chunk
            for start in range(0, frames, 4):
                plan = session.plan(start)
                latents = model(history[:, :, list(plan.indices)], reuse=plan.reuse)
                session.record(plan, steps=4)
        session.stats()

    Two sessions share nothing. One session is to be used from one thread at a time.

    Args:
        config: options; None: all defaults. family: name of the model family, ``config.family`` if None.
    """

    def __init__(self, config: Config | None = None, family: str | None = None) -> None:
        self.config = Config() if config is None else config
        self.family = self.config.family if family is None else family
        self.reset()

    def reset(self) -> None:
        """Forget the poses, what was observed and the records, as for a new video."""
        self.planner = Planner(self.config)
        self._records: list[_Record] = []
        self.scope: ChunkScope | None = None  # the chunk that is open
        self.kept = Kept()  # what compiled models left for the next chunk

    @property
    def poses(self) -> torch.Tensor:
        """``[N, 4, 4]`` float64 world-to-camera matrices seen so far, on the CPU."""
        return self.planner.poses

    @property
    def chunks(self) -> int:
        """Number of chunks recorded."""
        return len(self._records)

    def extend(self, w2c: Any) -> None:
        """Append poses, one a latent: ``[n, 4, 4]`` world-to-camera matrices, or one ``[4, 4]``; any dtype and device.

        A camera that is suddenly elsewhere (``context.teleport``) starts anew: what comes after remembers no gate of
        before, and keeps nothing from before for being new; what is old may still be retrieved.

        Raises:
            PoseError: not that shape, not finite or not rigid; nothing is appended then.
        """
        self.planner.extend(w2c)

    def observe(self, latents: torch.Tensor | None = None, *, dim: int = 2, depth: torch.Tensor | None = None,
                end: int | None = None) -> None:
        """Show what was generated, for plans that look at it (``context.window = "dynamics"``, rule "frustum").

        latents: finished latents with frames along ``dim``, such as ``[B, C, N, H, W]``; of two units the newest frames
        are read, which waits for them: call it between chunks. depth: ``[n, h, w]`` depth maps of the newest n latents,
        in pose units. end: number of latents finished with this one; None: all that have poses.

        Raises:
            PoseError: latents that are not finite.
        """
        self.planner.observe(latents, dim, depth, len(self.poses) if end is None else end)

    def plan(self, start: int, size: int | None = None) -> ChunkPlan:
        """Plan the chunk of latents ``start ... start + size - 1``; the latents before it are its history.

        Changes nothing, so it can be asked twice, and ahead. ``size``: ``context.chunk_frames`` if None.

        Raises:
            PoseError: poses of the chunk are not known yet, or ``start`` or ``size`` fits no whole chunk.
        """
        return self.planner.plan(start, self.config.context.chunk_frames if size is None else size)

    def plan_ahead(self, size: int | None = None) -> list[ChunkPlan]:
        """Plans of all whole chunks whose poses are known, in order: of a whole trajectory, if it is known."""
        size = self.config.context.chunk_frames if size is None else size
        return [self.planner.plan(start, size) for start in range(0, len(self.poses) - size + 1, size)]

    def chunk(self, start: int, size: int | None = None, *, steps: int | None = None) -> ChunkScope:
        """Plan a chunk, as ``plan`` does, and mark its steps, for sampling loops that run in Python::

            with session.chunk(start) as plan:
                for t in timesteps:
                    x = scheduler.step(model(x, t, ...), t, x)

        The plan is in force for compiled models that are called inside: graphs that see no camera poses (a denoising step
        with cached keys and values, memory slots without cameras) are pruned by it. Their steps are skipped under
        ``plan.reuse``, once a chunk that was computed in full has shown which inputs vary. A chunk in which any of this was
        done or looked for is recorded at its end. steps: their number, where it changes
        from chunk to chunk. An exception inside leaves nothing behind that a later chunk could reuse.

        Raises:
            PoseError: as ``plan``. LightInteractionError: a chunk is open already.
        """
        from li_compile.scope import ChunkScope

        return ChunkScope(self, self.plan(start, size), steps)

    def record(self, plan: ChunkPlan, *, steps: int | None = None, calls: int | None = None, **info: Any) -> None:
        """Note that a chunk was run under ``plan``.

        Args:
            steps: denoising steps of the schedule. calls: steps for which the model was called; if None and steps is
                given, what the plan implies.
            info: anything else to find again in ``stats()["per_chunk"]``, such as seconds.
        """
        if calls is None and steps is not None:
            calls = steps - len(self.config.cache.skipped(steps)) if plan.reuse else steps
        self._records.append(_Record(plan, steps, calls, info))

    def stats(self) -> dict[str, Any]:
        """What the recorded chunks came to. Plain data, fit for JSON.

        ``chunks``, ``reused_chunks``, ``guarded_chunks`` (computed in full because of ``cache.guard``); ``context_kept`` and ``context_possible``: latents summed over chunks, the
        second being the history that each plan was given; ``calls`` and ``calls_possible``: denoising calls made and
        steps of the schedules, None unless known for every chunk; ``per_chunk``: one dict a chunk.
        """
        records = self._records
        known = bool(records) and all(r.steps is not None and r.calls is not None for r in records)
        return {
            "chunks": len(records),
            "reused_chunks": sum(r.plan.reuse for r in records),
            "guarded_chunks": sum(bool(r.info.get("guarded")) for r in records),
            "context_kept": sum(len(r.plan.indices) for r in records),
            "context_possible": sum(r.plan.history for r in records),
            "calls": sum(r.calls for r in records) if known else None,
            "calls_possible": sum(r.steps for r in records) if known else None,
            "per_chunk": [
                {
                    **{k: v.item() if isinstance(v, torch.Tensor) else v for k, v in r.info.items()},
                    "context_kept": len(r.plan.indices),
                    "context_possible": r.plan.history,
                    "window": r.plan.window,
                    "coverage": r.plan.coverage,
                    "revisit": r.plan.revisit,
                    "teleported": r.plan.teleported,
                    "reuse": r.plan.reuse,
                    "score": r.plan.score,
                    "reason": r.plan.reason,
                    "steps": r.steps,
                    "calls": r.calls,
                }
                for r in records
            ],
        }

    def plot(self, path: str | pathlib.Path) -> None:
        """Draw which latents each recorded chunk kept, over time, into an image file (its suffix says which kind).

        Raises:
            LightInteractionError: nothing was recorded, or matplotlib is missing (``pip install 'li_compile[plot]'``).
        """
        from li_compile.plotting import plot_context

        plot_context([r.plan for r in self._records], path)

    def state_dict(self) -> dict[str, Any]:
        """The session as tensors and plain data, for :meth:`load_state_dict`; latents and caches are not part of it."""
        records = [saving.record_data(r.plan, r.steps, r.calls, r.info) for r in self._records]
        return {"version": saving.VERSION, "options": self.config.digest(), "planner": self.planner.state_dict(), "records": records}

    def load_state_dict(self, given: dict[str, Any]) -> None:
        """Go on where another session of the same options stood.

        Raises:
            LightInteractionError: it was saved under other options, by another version, or is no session's state.
        """
        saving.check(given, self.config)
        self.reset()
        self.planner.load_state_dict(given["planner"])
        self._records = [_Record(*saving.record(r)) for r in given["records"]]

    def save(self, path: str | pathlib.Path) -> None:
        """Write :meth:`state_dict` to a file."""
        torch.save(self.state_dict(), path)

    def load(self, path: str | pathlib.Path) -> None:
        """Read what :meth:`save` wrote. Raises LightInteractionError as :meth:`load_state_dict`."""
        self.load_state_dict(saving.read(path))

    @classmethod
    def current(cls) -> Session | None:
        """The innermost session entered in this thread or task; None outside of all."""
        active = _active.get()
        return active[-1] if active else None

    def __enter__(self) -> Session:
        _active.set((*_active.get(), self))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        active = _active.get()
        if not active or active[-1] is not self:
            raise LightInteractionError("this session is not the innermost one here; leave the innermost first")
        _active.set(active[:-1])

    def __repr__(self) -> str:
        return f"Session(preset={self.config.preset!r}, family={self.family!r}, poses={len(self.poses)})"
