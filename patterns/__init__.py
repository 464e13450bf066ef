"""Installed as li_compile.patterns; importing this folder by its bare name would make a second copy of it."""

if __name__ == "patterns":
    raise ImportError("import li_compile.patterns instead")

from .attention import CONTEXT, CURRENT, TEXT, AttentionSite, Segment, find_attention
from .context import ContextConcat, find_context
from .graph import Miss
from .loop import DenoisingLoop, find_loop
from .registry import Family, register_attention, register_context, register_family, register_loop
from .spelling import Spelling

__all__ = [
    "CONTEXT", "CURRENT", "TEXT", "AttentionSite", "ContextConcat", "DenoisingLoop", "Family", "Miss", "Segment", "Spelling",
    "find_attention", "find_context", "find_loop", "register_attention", "register_context", "register_family", "register_loop",
]
