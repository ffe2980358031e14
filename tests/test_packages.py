"""What is handed out: a source distribution that can test itself, and wheels whose tags are true."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    "altgrad",
    "ops_registry",
    "tests",
    "docs",
    "setup.py",
    "MANIFEST.in",
    "pyproject.toml",
    "README.md",
    "LICENSE",
]
pytestmark = pytest.mark.compiles


def setup(directory, *args, **environment):
    """setup.py in a copy of the sources; the name of what it left in dist."""
    for name in FILES:
        source, ignored = ROOT / name, shutil.ignore_patterns("*.so", "__pycache__")
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, directory / name, **({"ignore": ignored} if source.is_dir() else {}))
    command = [sys.executable, "setup.py", "-q", *args]
    done = subprocess.run(command, cwd=directory, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (package,) = (directory / "dist").iterdir()
    return package


def test_source_distribution_holds_the_tests_and_what_they_read(tmp_path):
    package = setup(tmp_path, "sdist")
    with tarfile.open(package) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("altgrad", "ops_registry", "tests", "docs"):
        paths = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.*") if "__pycache__" not in path.parts]
        assert {str(path) for path in paths if path.suffix != ".so"} <= names


@pytest.mark.parametrize("has_compiler", [False, True])
def test_tag_of_a_wheel(tmp_path, has_compiler):
    """One without the C kernels is for every platform, and never stands for one that has them."""
    compiler = tmp_path / "cc"  # makes empty files
    compiler.write_text('while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done; exit 0')
    package = setup(tmp_path, "bdist_wheel", CC=f"sh {compiler}" if has_compiler else "/no/such/compiler")
    assert package.name.endswith("-py3-none-any.whl") != has_compiler
