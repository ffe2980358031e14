"""Triton's interpreter: kernels on the CPU, for the tests named ``interpreted``, which test_interpreter.py runs."""

import dataclasses
import functools
import os

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

interpreted = pytest.mark.skipif(not INTERPRETS, reason="runs under test_interpreter.py")
