"""Model families: what is particular to a model and cannot be read from its graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family fixes.

    name: as in ``Config(family=...)``. description: one line for ``li-compile families``. roles: role -> argument name
    as it stands in the traced function, for ``history_w2c`` and ``current_w2c`` (camera poses) and ``positions``
    (temporal RoPE indices of the context). grid: rows and columns of tokens in a latent frame, or None to read it from
    the patch embedding. positions: of context frames that are kept, "keep" their temporal indices, "compact" them to the
    ones just before the current frames, or None: an input with indices is kept, what follows from the context's length
    is compacted.
    """

    name: str
    description: str = ""
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    grid: tuple[int, int] | None = None
    positions: str | None = None

    def __post_init__(self) -> None:
        if self.positions not in (None, "keep", "compact"):
            raise ValueError(f"positions of family {self.name!r} is {self.positions!r}; it must be 'keep', 'compact' or None")


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known. Raises ValueError if the name is taken by a different one."""
    if _FAMILIES.get(family.name, family) != family:
        raise ValueError(f"a family named {family.name!r} is registered already; choose another name")
    _FAMILIES[family.name] = family
    return family


def families() -> dict[str, Family]:
    """All registered families by name."""
    from .families import doom_world  # noqa: F401  (registers itself)

    return dict(_FAMILIES)
