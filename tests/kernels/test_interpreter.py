"""Runs the kernels' contracts with Triton's interpreter, in a process where it is switched on before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from li_compile.kernels._compat import has_triton, interpreting


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.skipif(interpreting(), reason="this is the interpreting process")
@pytest.mark.parametrize("file,least", [("test_contract.py", 40), ("test_selection.py", 15), ("test_pack.py", 20), ("test_history_in_place.py", 40),
                                        ("test_plugin.py", 10)])
def test_contract_in_the_interpreter(file, least):
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("numpy 2.4 breaks range() over a loaded value in Triton's interpreter (triton #9171)")
    contract = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton and cpu", str(contract)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= least, result.stdout[-2000:]
