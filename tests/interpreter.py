"""Triton's interpreter: kernels on the CPU, in a process of their own, for the tests named ``interpreted``."""

import dataclasses
import functools
import os
import subprocess
import sys

import pytest

try:
    import triton
except ImportError:
    triton = None

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETS:
    from triton.runtime import interpreter

    # It asks after every operation whether integers have wrapped, as those of the kernels may: a third of its time.
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options

    @functools.cache
    def patch_for_good(function, patch=interpreter._patch_lang):
        """Triton puts its interpreter into the language anew for every call of a function: a quarter of its time."""
        patch(function)
        return interpreter._LangPatchScope()  # of nothing to restore

    interpreter._patch_lang = patch_for_good

interpreted = pytest.mark.skipif(not INTERPRETS, reason="runs under test_interpreter")


def runs_interpreted(test):
    """Marks the test that calls :func:`run_interpreted`."""
    version = tuple(map(int, triton.__version__.split(".")[:2])) if triton else ()
    for mark in (
        pytest.mark.compiles,
        pytest.mark.skipif(triton is None or INTERPRETS, reason="needs triton"),
        pytest.mark.skipif(
            triton is not None and version < (3, 9),
            reason="the interpreter of older versions rounds a fused multiply-add twice",
        ),
    ):
        test = mark(test)
    return test


def run_interpreted(file):
    """Runs the interpreted tests of a file, all of which must pass."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-k", "interpreted", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout, run.stdout
