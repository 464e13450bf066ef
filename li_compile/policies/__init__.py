"""Selection policies: which history latents a chunk attends to. One small class a file, all behind ``Policy.choose``."""

from __future__ import annotations

from .authors import AuthorsPolicy
from .base import Choice, ChunkPlan, Policy, PolicyState, Scene
from .chunks import ChunkPolicy
from .coverage import CoveragePolicy
from .slots import SlotPolicy

__all__ = ["RELEASED", "SELECTORS", "AuthorsPolicy", "Choice", "ChunkPlan", "ChunkPolicy", "CoveragePolicy", "Policy",
           "PolicyState", "Scene", "SlotPolicy"]

#: ``context.policy`` -> the policy.
SELECTORS: dict[str, Policy] = {"coverage": CoveragePolicy(), "chunks": ChunkPolicy(), "authors": AuthorsPolicy(),
                                "slots": SlotPolicy()}

#: Policies that reproduce released code: no hysteresis, no look at novelty or teleports.
RELEASED = frozenset({"authors", "slots"})
