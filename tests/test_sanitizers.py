"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer: every entry point on every instruction set."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cpu import build

from ops_registry import cpu

TESTS = Path(__file__).parent
# After the flags of setup.py: what reads beyond an array at -O3 does at -O1, which builds in a third of the time.
CFLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
TARGETS = ["avx512", "avx2", "baseline"]
STRIPS = [(1, 32), (32, 1), (1, -1), (128, 128)]
RUN = {
    "test_cpu.py": ["sizes_and_guards", "one_special_among_many", "16_bit_conversions", "amax", "random_layouts"],
    "test_encode_blocks.py": ["blocks", "random_bits", "threads", "a_long_row"],
    "test_hadamard.py": ["c_kernel"],
    "test_launches.py": ["arguments", "two_outputs", "a_number", "no_launch", "keys", "room"],
    "test_matmul.py": ["targets", "scales_of_blocks_in_exact_rationals"],
    "test_packing.py": ["packing_of_every_instruction_set"],
    "test_quantize_blocks.py": [
        *("blocks", "random_bits", "results", "seeds_down_columns", "scales_of_every_magnitude"),
        *(f"strips[{block}-torch.{dtype}-4]" for block in STRIPS for dtype in ("float32", "bfloat16")),
    ],
    "test_random.py": ["words_of_the_c_kernel", "a_seed_of_rows_of_three"],
    "test_wide_formats.py": [
        *("near_ties[toward_zero-E8M0]", "near_ties[to_odd-UE5M3]", "near_ties[toward_positive-e4m9b7fn]"),
        *("stochastic_with_given_bits[torch.uint8-E8M0]", "stochastic_with_given_bits[torch.int32-e4m9b7fn]"),
        *("decode_every_code[E8M0]", "decode_every_code[e4m9b7fn]"),
    ],
}
SANITIZED = os.environ.get("SANITIZED_PACKAGE")


def exported():
    """The names of the library's functions."""
    sources = (Path(cpu.__file__).parent / "csrc").glob("*.c")
    return {name for path in sources for name in re.findall(r"^EXPORT .*?(altgrad_\w+)\(", path.read_text(), re.M)}


if SANITIZED:  # the process that test_sanitizers starts, which imports this file before it runs a test
    calls: collections.Counter[str] = collections.Counter()

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    for _name in exported():
        setattr(cpu._native, _name, counted(_name, getattr(cpu._native, _name)))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sanitized")
    compiler = directory / "cc"
    compiler.write_text(f'exec gcc "$@" {CFLAGS}')
    result = build(directory, CC=f"sh {compiler}")
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="module")
def runtimes():
    """The library that must come first, and that of C++, whose throw it intercepts."""
    names = ["libasan.so", "libstdc++.so"]
    paths = [subprocess.run(["gcc", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    if not all(os.path.isabs(path) for path in paths):
        pytest.skip("needs GCC with its sanitizers")
    return " ".join(path.strip() for path in paths)


@pytest.mark.compiles
@pytest.mark.skipif(cpu.backend() == "aten", reason="needs the C kernels")
@pytest.mark.parametrize("target", TARGETS)
def test_sanitizers(target, runtimes, package):
    """The tests of RUN pass in a sanitized build, and call every function of the library."""
    if cpu.select(cpu._native, target) is None:
        pytest.skip(f"needs a CPU with {target}")
    cpu.select(cpu._native, cpu.backend())
    others = ["aten", "formula", "cuda", *(name for name in TARGETS if name != target)]
    selection = " and ".join(f"not {name}" for name in others)
    tests = [f"{file}::test_{name}" for file, names in RUN.items() for name in names]
    last = f"{Path(__file__).name}::test_every_function_was_called"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, *tests, last],
        cwd=TESTS,
        env={
            **os.environ,
            "PYTHONPATH": str(package),
            "ALTGRAD_CPU_TARGET": target,
            "LD_PRELOAD": runtimes,
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={package}/report",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={package}/report",
            "SANITIZED_PACKAGE": str(package),
        },
        capture_output=True,
        text=True,
    )
    reports = [path.read_text()[:3000] for path in package.glob("report.*")]
    assert result.returncode == 0, "\n".join([*reports, result.stdout[-3000:], result.stderr[-3000:]])
    assert " passed" in result.stdout


@pytest.mark.skipif(not SANITIZED, reason="belongs to test_sanitizers")
def test_every_function_was_called():
    """The tests before it ran the build that it was made for, all of it."""
    assert str(Path(cpu.__file__).parents[1]) == SANITIZED
    assert cpu.backend() == os.environ["ALTGRAD_CPU_TARGET"]
    assert set(calls) == exported()
