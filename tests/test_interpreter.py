"""The tests named ``interpreted``, of all files in one process, where Triton interprets the kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import triton

VERSION = tuple(map(int, triton.__version__.split(".")[:2])) if triton else ()
FILES = sorted(path for path in Path(__file__).parent.glob("test_*.py") if "\n@interpreted\n" in path.read_text())


@pytest.mark.compiles
@pytest.mark.skipif(not VERSION, reason="needs triton")
@pytest.mark.skipif((0,) < VERSION < (3, 9), reason="older interpreters round a fused multiply-add twice")
def test_interpreter():
    command = [sys.executable, "-P", "-m", "pytest", "-v", "-k", "interpreted", "-p", "no:cacheprovider", *FILES]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    passed = {line.split("::")[0] for line in run.stdout.splitlines() if " PASSED " in line}
    assert {Path(file).name for file in passed} == {file.name for file in FILES}
