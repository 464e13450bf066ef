"""A report as one HTML page: no script, no font, no image from elsewhere."""

from __future__ import annotations

from functools import cache

import jinja2

from li_compile.report import Report
from li_compile.report_table import number

__all__ = ["page"]


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("li_compile", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"giga": lambda x: number(x, 1e9), "mega": lambda x: number(x, 1e6), "two": lambda x: number(x, 1),
                            "tera": lambda x: f"{x / 1e12:.3g}"}
    return environment.get_template("report.html.j2")


def page(report: Report) -> str:
    """The page of a report that ``explain`` made, or of one that compiling left (without milliseconds and outlines)."""
    return _template().render(report=report)
