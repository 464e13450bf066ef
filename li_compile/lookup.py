"""What ``torch.compile(model, backend="light_interaction")`` loads when it looks the name up, before it traces anything.

That is the last moment at which a family can hide from Dynamo what would break its model's graph. Torch looks up once in a process; a
model that is made later, and one that has to be given back as it was, is for ``li_compile.compile``, which prepares by itself.
"""

from __future__ import annotations

from li_compile.backend import light_interaction
from li_compile.patterns.preparation import prepare_loaded

__all__ = ["PREPARED", "light_interaction"]

PREPARED = prepare_loaded()
