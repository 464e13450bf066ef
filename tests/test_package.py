"""The installed package: names, import rules, and a wheel that works from another folder."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAY_IMPORT = {  # which of our packages each folder may import (docs: imports go one way)
    "kernels": set(),
    "patterns": set(),
    "passes": {"patterns", "kernels"},
    "li_compile": {"passes", "patterns", "kernels", "li_compile"},
}


def imports(path: pathlib.Path) -> set[str]:
    """Which of our packages a file imports, apart from its own by relative imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) and not node.level else []
        for parts in (name.split(".") for name in names if name.split(".")[0] == "li_compile"):
            second = parts[1] if len(parts) > 1 else ""
            found.add(second if second in MAY_IMPORT else "li_compile")
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert imports(path) <= MAY_IMPORT[folder] | {folder}, path


@pytest.mark.parametrize("folder", ["kernels", "passes", "patterns"])
def test_a_folder_imported_by_its_bare_name_says_what_to_import(folder):
    run = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode and f"import li_compile.{folder} instead" in run.stderr


def test_wheel_holds_all_packages_and_works_from_another_folder(tmp_path):
    built = subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
                           capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if not n.split("/")[0].endswith(".dist-info")} == {"li_compile"}
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT) if folder == "li_compile" else pathlib.Path("li_compile") / path.relative_to(ROOT)
            assert inside.as_posix() in names
    assert {"li_compile/templates/report.html.j2", "li_compile/kernels/tuned.json"} <= set(names)
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    code = ("import li_compile, li_compile.kernels, li_compile.passes.equal_rows, li_compile.patterns, torch;"
            "assert li_compile.__file__.startswith(%r), li_compile.__file__;"
            "assert 'light_interaction' in torch._dynamo.list_backends();"
            "print(torch.ops.li.sparse_attention)" % str(site))
    run = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True,
                         env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})
    assert run.returncode == 0, run.stderr[-2000:]


def test_importing_the_package_and_its_config_loads_no_torch():
    code = "import sys, li_compile; li_compile.Config(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
