"""Builds the C kernels of ops_registry/csrc into ops_registry/_kernels.so, one object for each instruction set.

Everything else is said in pyproject.toml. Where there is no C compiler the install goes on without the library.
"""

import hashlib
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Traps are off in the kernels, and GCC vectorizes few selections unless it knows. Buffers hold operands of any dtype.
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-strict-aliasing", "-fvisibility=hidden"]
TARGETS = {"baseline": []}
IS_X86 = platform.machine() in ("x86_64", "AMD64") and sys.platform != "darwin"
if IS_X86:
    TARGETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    TARGETS["avx512"] = [
        *TARGETS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ]


class BuildKernels(build_ext):
    """One compilation of kernels.c for each instruction set; the library is loaded by ctypes, not imported."""

    def build_extension(self, ext):
        source = Path("ops_registry/csrc")
        build = Path(self.build_temp)
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(source.glob("*.[ch]")))).hexdigest()
        objects = self.compiler.compile(
            [str(source / "main.c"), str(source / "launches.c")],
            str(build),
            macros=[("SOURCES", f'"{digest}"'), *([("ALTGRAD_X86", None)] if IS_X86 else [])],
            extra_postargs=FLAGS,
            depends=ext.depends,
        )
        for target, flags in TARGETS.items():
            objects += self.compiler.compile(
                [str(source / "kernels.c")],
                str(build / target),
                macros=[("TARGET", target)],
                extra_postargs=FLAGS + flags,
                depends=ext.depends,
            )
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(library), libraries=["m"])

    def get_ext_filename(self, name):
        return str(Path(*name.split("."))) + ".so"  # no Python's tag: it depends on none


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform; without the C kernels one for every platform."""

    def get_tag(self):
        has_kernels = Path(self.bdist_dir, "ops_registry/_kernels.so").exists()
        return "py3", "none", super().get_tag()[2] if has_kernels else "any"


setup(
    ext_modules=[
        Extension(
            "ops_registry._kernels",
            sources=[],
            depends=[str(path) for path in sorted(Path("ops_registry/csrc").iterdir())],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
