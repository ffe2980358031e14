"""The C library ``_kernels.so``, built from csrc where a compiler is at hand."""

import ctypes
import hashlib
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

_PATH = Path(__file__).with_name("_kernels.so")


@cache
def load() -> Any:
    """None where it was not built; ImportError where it was built from other sources."""
    if not _PATH.exists():
        return None
    native = ctypes.CDLL(str(_PATH))
    sources = b"".join(source.read_bytes() for source in sorted(_PATH.with_name("csrc").glob("*.[ch]")))
    digest = hashlib.sha256(sources).hexdigest().encode()
    if not hasattr(native, "altgrad_sources") or ctypes.string_at(native.altgrad_sources) != digest:
        raise ImportError(f"{_PATH} was built from other sources than are in csrc: build altgrad again")
    return native


def of_torch(name: str) -> int:
    """The address of one of torch's C functions."""
    # The handle of torch's extension module reaches whatever that links to.
    return ctypes.cast(getattr(ctypes.CDLL(torch._C.__file__), name), ctypes.c_void_p).value or 0


_WITHOUT = {
    "CPU": "computes on the CPU without its C kernels, 14 to 60 times slower",
    "CUDA": "launches CUDA kernels without its C library, which takes longer",
}


@cache
def warn_without(device: str) -> None:
    """Once: what altgrad does without the library, unless that was asked for."""
    if os.environ.get("ALTGRAD_CPU_TARGET"):
        return
    folder = _PATH.parent
    if (folder.parent / "pyproject.toml").exists():
        advice = (
            "it is a source tree, which Python found before what is installed. Start Python in another directory or "
            "with PYTHONSAFEPATH=1, or build the kernels in place with `pip install -e .`"
        )
    else:
        advice = (
            "no C compiler was found when altgrad was installed. Install one, then altgrad again with "
            "`pip install --force-reinstall --no-cache-dir`: pip keeps what it once built"
        )
    warnings.warn(
        f"altgrad {_WITHOUT[device]}: {folder} has none, for {advice}. "
        "The environment variable ALTGRAD_CPU_TARGET=aten asks for this and silences the warning.",
        stacklevel=2,
    )
