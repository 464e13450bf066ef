"""docs/write_a_family.md, followed to the letter: a package of its own, found by its entry point, fires as the page says."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "write_a_family.md").read_text()
FILES = dict(re.findall(r"^`([\w./]+)`\n```\w+\n(.*?)^```$", PAGE, re.M | re.S))
BEFORE, LISTED, AFTER = re.findall(r"^```text\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("how_to")
    for name, text in FILES.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(text)
    return made


def python(folder, *arguments) -> str:
    """Run Python in a folder away from the checkout, with what is installed there."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": f"{folder / 'site'}{os.pathsep}{folder}", "COLUMNS": "130"}
    run = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_the_page_is_true(folder):
    assert {"harbour.py", "before.py", "after.py", "harbour_li/pyproject.toml", "harbour_li/harbour_family.py"} == set(FILES)
    assert sum(len(FILES[n].splitlines()) for n in FILES if n.startswith("harbour_li/")) <= 80
    assert python(folder, "before.py") == BEFORE
    (command,) = re.findall(r"^pip (install .*) \./harbour_li$", PAGE, re.M)
    python(folder, "-m", "pip", *command.split(), "--quiet", "--target", "site", "./harbour_li")
    listed = python(folder, "-c", "from li_compile.cli import app; app()", "families")
    assert LISTED.split() in [line.split() for line in listed.splitlines()]
    assert python(folder, "after.py") == AFTER
