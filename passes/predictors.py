"""What stands in for the model's output at a step that is not computed: a weighted sum of outputs that were.

With v[i] the output of step i of this chunk, p[i] that of the last chunk that was computed in full, a < b the last two
computed steps before i, and t[i] the time of step i:

    hold       v[b]                                                        Light Interaction eq. 5-8
    linear     v[b] + (v[b] - v[a]) (t[i] - t[b]) / (t[b] - t[a])          first order along the trajectory; v[b] without an a
    previous   v[b] + p[i] - p[b]                                          the change over the same steps of an earlier chunk

An earlier chunk's output itself is of no use: it points from that chunk's noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import sympy

NOW, PREVIOUS = 0, -1
Source = tuple[int, int]  # (chunk, step)
Weights = dict[Source, sympy.Expr]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """weights(step, computed, times): the sum for a step, given the steps computed before it (never none) and the
    time of every step. across: whether it reads outputs of an earlier chunk."""

    name: str
    weights: Callable[[int, Sequence[int], Sequence[sympy.Expr]], Weights]
    across: bool = False


def _hold(step: int, computed: Sequence[int], times: Sequence[sympy.Expr]) -> Weights:
    return {(NOW, computed[-1]): sympy.Integer(1)}


def _linear(step: int, computed: Sequence[int], times: Sequence[sympy.Expr]) -> Weights:
    if len(computed) < 2:
        return _hold(step, computed, times)
    a, b = computed[-2:]
    slope = (times[step] - times[b]) / (times[b] - times[a])
    return {(NOW, a): -slope, (NOW, b): 1 + slope}


def _previous(step: int, computed: Sequence[int], times: Sequence[sympy.Expr]) -> Weights:
    b = computed[-1]
    return {(NOW, b): sympy.Integer(1), (PREVIOUS, step): sympy.Integer(1), (PREVIOUS, b): sympy.Integer(-1)}


PREDICTORS: dict[str, Predictor] = {p.name: p for p in (
    Predictor("hold", _hold), Predictor("linear", _linear), Predictor("previous", _previous, across=True))}


@dataclasses.dataclass(frozen=True)
class Skipping:
    """Which of a loop's steps are not computed, and what stands in for them. Neither the first nor the last is skipped.

    With hold and all steps between the first and the last skipped, what is left is a schedule of two steps: the state
    moves from the first noise level to the last but one in one update, and then to the end (for Euler and, since all
    differences of equal predictions vanish, for UniPC).
    """

    steps: int
    skip: tuple[int, ...]
    predictor: Predictor

    @property
    def computed(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.steps) if i not in self.skip)

    def weights(self, step: int, times: Sequence[sympy.Expr] | None) -> Weights:
        """The sum that stands in for a step: one that is skipped, or the last, to be compared with what it computes.

        times: None if they are unknown; then steps count as evenly spaced.
        """
        before = [i for i in self.computed if i < step]
        return self.predictor.weights(step, before, times or [sympy.Integer(i) for i in range(self.steps)])

    def remembered(self) -> tuple[int, ...]:
        """Steps of a fully computed chunk whose outputs later chunks read."""
        wanted = [*self.skip, self.steps - 1] if self.skip else []
        return tuple(sorted({step for i in wanted for chunk, step in self.weights(i, None) if chunk == PREVIOUS}))
