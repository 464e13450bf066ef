"""What outlives a chunk of one rollout: the poses seen so far, and what was decided and spent."""

from __future__ import annotations

import contextvars
import dataclasses
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from li_compile.config import Config
from li_compile.errors import LightInteractionError, PoseError
from li_compile.memory import Kept
from li_compile.policy import ChunkPlan, check_poses, plan_context

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
        """Forget the poses and the records, as for a new video."""
        self._poses = torch.empty(0, 4, 4, dtype=torch.float64)
        self._records: list[_Record] = []
        self.scope: ChunkScope | None = None  # the chunk that is open
        self.kept = Kept()  # what compiled models left for the next chunk

    @property
    def poses(self) -> torch.Tensor:
        """``[N, 4, 4]`` float64 world-to-camera matrices seen so far, on the CPU."""
        return self._poses

    @property
    def chunks(self) -> int:
        """Number of chunks recorded."""
        return len(self._records)

    def extend(self, w2c: Any) -> None:
        """Append poses, one a latent: ``[n, 4, 4]`` world-to-camera matrices, or one ``[4, 4]``; any dtype and device.

        Raises:
            PoseError: not that shape, not finite or not rigid; nothing is appended then.
        """
        if getattr(w2c, "ndim", None) == 2:
            w2c = w2c[None]
        added = check_poses(w2c, "added", first=len(self._poses))
        self._poses = torch.cat((self._poses, added))

    def plan(self, start: int, size: int | None = None) -> ChunkPlan:
        """Plan the chunk of latents ``start ... start + size - 1``; the latents before it are its history.

        Changes nothing, so it can be asked twice. ``size``: ``context.chunk_frames`` if None.

        Raises:
            PoseError: poses of the chunk are not known yet, or ``start`` or ``size`` fits no whole chunk.
        """
        size = self.config.context.chunk_frames if size is None else size
        if start < 0 or size < 1:
            raise PoseError(f"no such chunk: start {start}, size {size}; start counts latents from 0")
        if start + size > len(self._poses):
            raise PoseError(
                f"latents {start} to {start + size - 1} need poses, {len(self._poses)} are known; "
                "call extend() with the chunk's poses before plan()"
            )
        return plan_context(self._poses[:start], self._poses[start : start + size], self.config)

    def chunk(self, start: int, size: int | None = None, *, steps: int | None = None) -> ChunkScope:
        """Plan a chunk, as ``plan`` does, and mark its steps, for sampling loops that run in Python::

            with session.chunk(start) as plan:
                for t in timesteps:
                    x = scheduler.step(model(x, t, ...), t, x)

        Steps of compiled models that are called inside are skipped under ``plan.reuse``, once a chunk that was computed
        in full has shown which inputs vary; the chunk is recorded at the end. steps: their number, where it changes
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
                    "reuse": r.plan.reuse,
                    "score": r.plan.score,
                    "reason": r.plan.reason,
                    "steps": r.steps,
                    "calls": r.calls,
                }
                for r in records
            ],
        }

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
        return f"Session(preset={self.config.preset!r}, family={self.family!r}, poses={len(self._poses)})"
