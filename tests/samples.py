"""Arguments for every operator, once: what opcheck and the tests of layouts, transforms, devices and meshes call."""

import torch

from ops_registry.arithmetic import compute_dtype
from ops_registry.operators import OPERATORS


def integers(x, dtype):
    """Numbers from 0 to 255, laid out in memory as x is, overlaps included; on the meta device none."""
    storage = torch.arange(x.untyped_storage().nbytes() // x.element_size(), device=x.device) * 37 % 256
    return storage.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def codes(x):
    return integers(x, torch.uint8)


def random_bits(x):
    return integers(x, torch.int32) << 16


def other_dtype(x):
    """A dtype that project takes to, other than x's where there is another."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32 if x.itemsize == 2 else torch.bfloat16


def matrix(x):
    """x as a matrix of a dtype that matmul takes, to a row of a second tile and to a column after many roundings."""
    x = (x.reshape(1, -1) if x.ndim < 2 else x.flatten(0, -2))[:70, :45]
    return x.float() if x.dtype == torch.float64 else x


def tensor_scale(x):
    return torch.full((), 0.01, dtype=compute_dtype(x.dtype), device=x.device)


def pairs_along_two_dimensions(x):
    """Blocks, of which those along one dimension are uneven in most layouts: each more doubles what is traced."""
    return [*[1] * (x.ndim - 2), 2, 2][-x.ndim :] if x.ndim else []


# name -> the arguments for a floating-point x and a scale that broadcasts to it
SAMPLES = {
    "quantize": lambda x, scale: (x, scale, "E4M3", "none", "toward_zero"),
    "quantize_stochastic": lambda x, scale: (x, scale, random_bits(x), "E7M0"),
    "encode": lambda x, scale: (x, scale, "E5M2", "none", "to_odd"),
    "encode_stochastic": lambda x, scale: (x, scale, random_bits(x), "E0M7", "finite"),
    "quantize_gradient": lambda x, scale: (x, scale, "E5M2"),
    "quantize_gradient_stochastic": lambda x, scale: (x, scale, random_bits(x), "E5M2"),
    "project": lambda x, scale: (x, scale, "E3M4", "propagate", "toward_positive", other_dtype(x)),
    "project_stochastic": lambda x, scale: (x, scale, random_bits(x), "E5M2"),
    "decode": lambda x, scale: (codes(x), scale, "E3M4", x.dtype),  # no NaN: opcheck takes it for a difference
    "dequantize": lambda x, scale: (x, scale),
    "quantize_blocks": lambda x, scale: (
        *(x, None, "E4M3", "none", "toward_zero"),
        *(pairs_along_two_dimensions(x), "rceil"),
    ),
    "quantize_blocks_stochastic": lambda x, scale: (
        *(x, tensor_scale(x), random_bits(x), "E2M1", "finite"),
        *([-1] * x.ndim, None, "E4M3"),
    ),
    "quantize_operand": lambda x, scale: (
        *(x, tensor_scale(x), "E2M1", "propagate", "nearest_ties_to_even"),
        *([*[1] * (x.ndim - 1), 3][: x.ndim], None, "E4M3", 1.0625, other_dtype(x)),
    ),
    "quantize_operand_stochastic": lambda x, scale: (
        *(x, None, random_bits(x), "E5M2", "finite"),
        [*[1] * (x.ndim - 1), 2][: x.ndim],
    ),
    "quantize_operands": lambda x, scale: (
        *(x if x.ndim > 1 else x.reshape(1, -1), tensor_scale(x), 2 * tensor_scale(x)),
        *("E2M1", "propagate", "toward_zero", [*[1] * (max(x.ndim, 2) - 1), 2], None, "E4M3", 1.0, other_dtype(x)),
    ),
    "as_scale": lambda x, scale: (x if x.dtype == torch.float64 else x.float(), 448.0),
    "encode_blocks": lambda x, scale: (
        *(x if x.ndim else x.unsqueeze(0), tensor_scale(x), "E2M1", "propagate", "nearest_ties_to_even"),
        *([*[1] * (x.ndim - 1), 3], None, "E4M3"),
    ),
    "encode_blocks_stochastic": lambda x, scale: (
        *(x if x.ndim else x.unsqueeze(0), None, random_bits(x if x.ndim else x.unsqueeze(0)), "E3M2", "finite"),
        *(pairs_along_two_dimensions(x) or [2], "rceil"),
    ),
    "pack": lambda x, scale: (codes(x).unsqueeze(0), 6),
    "unpack": lambda x, scale: (codes(x).unsqueeze(0), 4, 2 * x.unsqueeze(0).shape[-1]),
    "matmul": lambda x, scale: (matrix(x), matrix(x).mT, "g4f9e6m7np8"),
    "amax": lambda x, scale: (x.unsqueeze(0), sorted({0, x.ndim})),
}
POINTWISE = [name for name, operator in OPERATORS.items() if operator.is_pointwise]
LAID_OUT_LIKE_X = [name for name, operator in OPERATORS.items() if operator.is_laid_out_like_x]
