"""The random Hadamard transform of NVFP4's recipe: 16 elements along the contraction, with fixed signs."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ops_registry.arithmetic import compute_dtype

from .watch import announce

SIZE = 16
# The signs of TransformerEngine's NVFP4 recipe, get_wgrad_sign_vector.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
# diag(signs) H / 4 with Sylvester's H, which has the parity of the common bits of row and column.
ROWS = [[SIGNS[i] * (-1) ** (i & j).bit_count() / 4 for j in range(SIZE)] for i in range(SIZE)]

_matrices: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def hadamard(x: Tensor) -> Tensor:
    """``x' = x diag(signs) H / 4`` in blocks of 16 of the last dimension, which zeros fill up; float32 (or float64).

    The transform is orthogonal: two operands that are transformed alike have the product that they had. It is a product
    itself, with accumulation in float32, of the exact numbers +-1/4.
    """
    missing = -x.shape[-1] % SIZE
    x = pad(x, (0, missing)) if missing else x
    announce(None)
    dtype = compute_dtype(x.dtype)
    is_narrow = x.is_cuda and x.dtype == torch.bfloat16
    if is_narrow and x.ndim == 2 and x.stride(0) == 1 and not hasattr(x, "device_mesh"):
        return _of_columns(x)
    rows = x.reshape(-1, SIZE)
    matrix = _matrix(x.dtype if is_narrow else dtype, x.device)
    if hasattr(x, "device_mesh"):
        matrix = _replicated(matrix, x.device_mesh)
    y = torch.mm(rows, matrix, out_dtype=dtype) if is_narrow else rows.to(dtype) @ matrix
    return y.view(x.shape)


def _of_columns(x: Tensor) -> Tensor:
    """:func:`hadamard` of a transposed bfloat16 matrix on CUDA, from the left where it lies: no transposed copy."""
    columns = x.mT.unflatten(0, (-1, SIZE))
    matrix = _matrix(x.dtype, x.device).mT.expand(columns.shape[0], SIZE, SIZE)
    return torch.bmm(matrix, columns, out_dtype=torch.float32).view(x.mT.shape).mT


def _matrix(dtype: torch.dtype, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():  # a constant of the graph
        return torch.tensor(ROWS, dtype=dtype, device=device)
    if (dtype, device) not in _matrices:
        _matrices[dtype, device] = torch.tensor(ROWS, dtype=dtype, device=device)
    return _matrices[dtype, device]


def _replicated(matrix: Tensor, mesh: Any) -> Tensor:
    """A DTensor that every rank has whole."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(matrix, mesh, [Replicate()] * mesh.ndim, run_check=False)
