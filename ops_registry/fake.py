"""What the output looks like: shape, dtype and strides, a function of the first argument alone."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_decode, check_dequantize, check_quantize, check_stochastic
from .schemas import library
from .sharding import register_where_used

# Raised by every change of a result or of a gradient. Compiled code is cached on disk under the operator's name and
# arguments only; with this in the key, new numerics never meet old compiled code.
NUMERICS_REVISION = "1"


def _stamp_compile_cache() -> None:
    """Puts the revision into the key of the compile caches, which cover all of Inductor's configuration.

    Fakes run before the key is computed. Inductor is not imported for it: if nobody has, nothing is compiled.
    """
    config: Any = sys.modules.get("torch._inductor.config")
    if config is None:
        return
    marks = config.unsafe_marked_cacheable_functions
    if marks.get("torch.ops.altgrad") != NUMERICS_REVISION:
        config.unsafe_marked_cacheable_functions = {**marks, "torch.ops.altgrad": NUMERICS_REVISION}


def _fake(name: str) -> Callable[..., Tensor]:
    check, dtype_of = _CONTRACTS[name]

    def fake(x: Tensor, *args: Any) -> Tensor:
        _stamp_compile_cache()
        register_where_used()
        check(x, *args)
        return torch.empty_like(x, dtype=dtype_of(x, *args))

    return fake


def _decoded(codes: Tensor, scale: Tensor, format: str, dtype: torch.dtype | None = None) -> torch.dtype:
    return dtype or torch.float32


# operator -> what it accepts, and the dtype of its output
_CONTRACTS: dict[str, tuple[Callable[..., Any], Callable[..., torch.dtype]]] = {
    "quantize": (check_quantize, lambda x, *args: x.dtype),
    "quantize_stochastic": (check_stochastic, lambda x, *args: x.dtype),
    "encode": (check_quantize, lambda x, *args: torch.uint8),
    "encode_stochastic": (check_stochastic, lambda x, *args: torch.uint8),
    "quantize_gradient": (check_quantize, lambda x, *args: x.dtype),
    "quantize_gradient_stochastic": (check_stochastic, lambda x, *args: x.dtype),
    "decode": (check_decode, _decoded),
    "dequantize": (check_dequantize, lambda x, *args: x.dtype),
}

for _name in _CONTRACTS:
    torch.library.register_fake(f"altgrad::{_name}", _fake(_name), lib=library)
