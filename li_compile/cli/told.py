"""What sub-commands share: options as a Config, and errors as a line on stderr with exit status 2."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from li_compile.config import Config


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Ends the command where li_compile raises an error on purpose."""
    from li_compile.errors import LightInteractionError

    try:
        yield
    except LightInteractionError as error:
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def config_of(preset: str, option: list[str] | None) -> Config:
    """Raises ConfigError as ``Config.from_options`` does."""
    from li_compile.config import Config

    return Config.from_options({"preset": preset, **dict(parse(text) for text in option or [])})


def parse(text: str) -> tuple[str, object]:
    """``KEY=VALUE`` with VALUE as JSON where it is JSON, else as it stands."""
    from li_compile.errors import ConfigError

    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"option {text!r} has no '='; give KEY=VALUE, such as sparse.topk_ratio=0.25")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
