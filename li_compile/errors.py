"""What li_compile raises. Every message says what was found, where, and what to do about it."""

from __future__ import annotations

__all__ = ["ArtifactError", "BackendUnavailable", "ConfigError", "ExportError", "LightInteractionError", "PatternError", "PoseError", "RewriteError"]


class LightInteractionError(Exception):
    """Base of all errors that li_compile raises on purpose; catch this one to catch them all."""


class ConfigError(LightInteractionError, ValueError):
    """An option that is unknown, of the wrong type, out of range, or at odds with another option."""


class PatternError(LightInteractionError):
    """A pattern or model family that cannot be registered or does not hold what it promises."""


class RewriteError(LightInteractionError):
    """A rewrite that failed or left a graph that does not check; raised under ``strict``, else a warning."""


class PoseError(LightInteractionError, ValueError):
    """Camera poses of the wrong shape, not finite, not rigid, or of a number that fits no whole chunk."""


class ExportError(LightInteractionError):
    """A program that cannot be exported to the target asked for."""


class BackendUnavailable(ExportError):
    """A target whose packages, driver or compiler are not here; says which and how to get them."""


class ArtifactError(LightInteractionError):
    """An exported artifact that cannot be loaded here, or inputs that it was not exported for."""
