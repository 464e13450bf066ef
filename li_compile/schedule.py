"""A sampling loop that runs in Python, recognised from the calls of one chunk: who is called when, and what varies.

The calls of a chunk in order, with guidance as two calls a step::

    (x0, t0, empty)  (x0, t0, text)  (x1, t1, empty)  (x1, t1, text)  ...

are read as steps of two branches if, branch by branch, the same inputs vary from each step to the next: few numbers that
fall or rise throughout (the time), and what has the shape of the output (the state).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from li_compile.prints import Print

MOST_BRANCHES = 4


@dataclasses.dataclass(frozen=True)
class Schedule:
    """times[i]: the small inputs that vary, at step i, by position; varying: positions of all inputs that may vary."""

    branches: int
    varying: frozenset[int]
    times: tuple[dict[int, Print], ...]

    @property
    def steps(self) -> int:
        return len(self.times)

    def numbers(self) -> list[float]:
        """The time of each step, as the first number of the first input that tells it."""
        return [next(iter(t.values())).number() for t in self.times]


def read_schedule(calls: Sequence[Sequence[Print]], output: tuple[int, ...]) -> Schedule | str:
    """The schedule that the calls of one chunk follow, or why they are no sampling loop.

    calls: the inputs of each call. output: shape of what each call gives.
    """
    reason = f"{len(calls)} calls in the chunk, too few for steps to skip"
    for branches in range(1, MOST_BRANCHES + 1):
        if len(calls) % branches == 0 and len(calls) // branches >= 2:
            found = _read(calls, branches, output)
            if isinstance(found, Schedule):
                return found
            reason = found if branches == 1 else reason
    return reason


def _read(calls: Sequence[Sequence[Print]], branches: int, output: tuple[int, ...]) -> Schedule | str:
    steps = len(calls) // branches
    changed = {frozenset(p for p, (a, b) in enumerate(zip(calls[k], calls[k + branches])) if a != b)
               for k in range(len(calls) - branches)}
    if len(changed) > 1:
        return "other inputs change from one call to the next than before"
    (varying,) = changed
    first = calls[0]
    few = lambda shape: 4 * math.prod(shape or ()) <= math.prod(output)  # numbers, against what a state has
    times = [p for p in sorted(varying) if first[p].small and few(first[p].shape)]
    others = sorted(varying - set(times))
    if len(others) > 1 or any(not _like(first[p].shape, output) for p in others):
        shapes = ", ".join(str(first[p].shape) for p in others)
        return f"inputs of shape {shapes} change from call to call, or nobody can tell (made under torch.inference_mode), " \
               f"where one state for the output of {output} may"
    rising = [p for p in times if _one_way([calls[i * branches][p].number() for i in range(steps)])]
    if not rising:
        return "no input tells a time that falls or rises from call to call"
    if any(calls[i * branches + b][p] != calls[i * branches][p] for i in range(steps) for b in range(branches) for p in times):
        return "the calls of one step are told different times"
    times.sort(key=lambda p: p not in rising)
    return Schedule(branches, varying, tuple({p: calls[i * branches][p] for p in times} for i in range(steps)))


def _like(shape: tuple[int, ...] | None, output: tuple[int, ...]) -> bool:
    """Whether a tensor may be the state of a model with this output: all dimensions but one (channels) are alike."""
    return shape is not None and len(shape) == len(output) and sum(a != b for a, b in zip(shape, output)) <= 1


def _one_way(numbers: list[float | None]) -> bool:
    if None in numbers:
        return False
    steps = [b - a for a, b in zip(numbers, numbers[1:])]
    return all(s > 0 for s in steps) or all(s < 0 for s in steps)
