"""Sessions as plain data: what is written, and what is checked when it is read."""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
from typing import Any

import torch

from li_compile.config import Config
from li_compile.errors import LightInteractionError
from li_compile.policies.base import ChunkPlan, PolicyState

__all__ = ["VERSION", "check", "read", "record", "record_data"]

VERSION = 1


def record_data(plan: ChunkPlan, steps: int | None, calls: int | None, info: dict[str, Any]) -> dict[str, Any]:
    """A recorded chunk as plain data."""
    return {"plan": dataclasses.asdict(plan), "steps": steps, "calls": calls, "info": info}


def record(data: dict[str, Any]) -> tuple[ChunkPlan, int | None, int | None, dict[str, Any]]:
    """The inverse of :func:`record_data`."""
    plan = dict(data["plan"])
    return ChunkPlan(**plan | {"state": PolicyState(**plan["state"])}), data["steps"], data["calls"], dict(data["info"])


def read(path: str | pathlib.Path) -> Any:
    """What a file holds; tensors and plain data only. Raises LightInteractionError if it holds anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise LightInteractionError(f"there is no file {path}; give one that Session.save() wrote") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise LightInteractionError(f"{path} is no saved session: {str(error).splitlines()[0]}") from None


def check(given: Any, config: Config) -> None:
    """Whether this is the state of a session with these options; raises LightInteractionError if not."""
    if not isinstance(given, dict) or {"version", "options", "planner", "records"} - set(given):
        raise LightInteractionError("this is no state of a session; give what Session.state_dict() or Session.save() made")
    if given["version"] != VERSION:
        raise LightInteractionError(f"the session was saved in format {given['version']}, this is format {VERSION}; save it anew")
    if given["options"] != config.digest():
        raise LightInteractionError("the session was saved under other options, and its decisions would not go on as they began; make "
                                    "the Session with the Config that it was saved with")
