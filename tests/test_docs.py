"""The documentation: it builds without a warning, its links lead somewhere, and its code runs."""

from __future__ import annotations

import ast
import contextlib
import pathlib
import re
import subprocess
import sys
import unittest

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading)
    return re.sub(r"[\s]", "-", re.sub(r"[^\w\s-]", "", plain.strip().lower()))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor:
            headings = {slug(h) for h in re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)}
            assert anchor in headings, f"{page.name}: {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if CODE.search(p.read_text(encoding="utf-8"))], ids=lambda p: p.stem)
def test_every_python_block_parses(page):
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        ast.parse(block)


@pytest.fixture
def eager(monkeypatch):
    """Rewritten graphs run as they are: what Inductor makes of them is tested elsewhere, and takes minutes."""
    monkeypatch.setattr("li_compile._compat.inductor", lambda module, inputs, patches, digest: module)
    with torch.set_grad_enabled(torch.is_grad_enabled()):  # a page may switch gradients off for good
        yield


RUN_ELSEWHERE = {"write_a_family"}  # as an installed package: test_write_a_family.py


@pytest.mark.filterwarnings("ignore:light_interaction found nothing to rewrite")
@pytest.mark.parametrize("page", [p for p in PAGES if p.stem not in RUN_ELSEWHERE and CODE.search(p.read_text(encoding="utf-8"))],
                         ids=lambda p: p.stem)
def test_code_runs(page, eager, tmp_path, monkeypatch):
    """The blocks of a page, one after another in one namespace. What a page takes from its reader (a model, a scheduler,
    poses) is made in a comment of the page, ``<!--- invisible-code-block: python``; what cannot run here is skipped there,
    with the reason."""
    document = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(page.parent)).parse(page)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    seen = 0
    for seen, example in enumerate(document.examples(), start=1):  # noqa: B007
        with contextlib.suppress(unittest.SkipTest):
            example.evaluate()
    assert seen >= len(CODE.findall(page.read_text(encoding="utf-8")))


def test_a_skipped_block_says_why():
    for page in PAGES:
        for directive in re.findall(r"<!--+ *skip:.*?-->", page.read_text(encoding="utf-8")):
            assert re.fullmatch(r'<!--+ *skip: next "[^"]+" *-->', directive), (page.name, directive)


def test_the_site_builds_without_a_warning(tmp_path):
    run = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"), "-f", str(ROOT / "mkdocs.yml")],
                         capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    for page in sorted((ROOT / "docs").rglob("*.md")):
        made = tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix("")
        assert (made.parent if page.stem == "index" else made).joinpath("index.html").is_file(), page
    options = (tmp_path / "site" / "reference" / "config" / "index.html").read_text(encoding="utf-8")
    for option in ("topk_ratio", "temporal_frames", "min_steps"):
        assert option in options
    assert "li_compile.patterns.registry.Family" in (tmp_path / "site" / "reference" / "patterns" / "index.html").read_text(encoding="utf-8")
