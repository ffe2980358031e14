"""Matrix products with the accumulator of a tensor core: the bits that the hardware gives, on any machine.

``torch._scaled_mm`` on an H100 is no float32 sum: docs/accumulators.md says what it is.
"""

import torch
from torch import Tensor

from ops_registry.accumulators import ACCUMULATORS, Accumulator, resolve_accumulator
from ops_registry.checks import check_tensor

__all__ = ["ACCUMULATORS", "Accumulator", "matmul", "resolve_accumulator"]


def matmul(
    a: Tensor,
    b: Tensor,
    accumulator: Accumulator | str,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
) -> Tensor:
    """``a @ b``, its dot products summed as an accumulator does; the operator ``torch.ops.altgrad.matmul``.

    Args:
        a: [..., M, K], float32, bfloat16 or float16, of values that the accumulator's operands can have.
        b: [..., K, N], with the same dimensions in front.
        accumulator: a name of :data:`ACCUMULATORS` or a spelling. Its operands' formats may stand behind it:
            ``"HOPPER_FP8(E5M2,E4M3)"``.
        a_scale: [..., M, K / n], rounded up, for an accumulator with a scale for each n products (``BLACKWELL_MXFP8``,
            ``BLACKWELL_NVFP4``), of values of their scales' format; for no other.
        b_scale: [..., K / n, N], likewise.

    Returns:
        [..., M, N] in float32. Both gradients are products by the same accumulator, of the incoming gradient as it is;
        with scales of blocks by the one without them, of the other operand times its scales in float32, and then times
        the scales of its own: infinite where one of these is beyond float32, as 2 times a scale of 2^127 is.

    Raises:
        TypeError: other dtypes, or no tensors.
        ValueError: an unknown accumulator, shapes that do not multiply, values that operands cannot have.
        RuntimeError: tensors on different devices.

    Example:
        >>> import torch
        >>> from altgrad.accumulators import matmul
        >>> a, b = torch.ones(1, 1024), torch.full((1024, 1), 1.25)
        >>> a[0, 0], b[0, 0] = 64.0, 64.0
        >>> matmul(a, b, "HOPPER_FP8_FAST").item(), (a @ b).item()  # 64 * 64 and 1023 times 1.25
        (5119.0, 5374.75)
    """
    for operand, tensor in (("a", a), ("b", b)):
        check_tensor(operand, tensor)
    name = accumulator.name if isinstance(accumulator, Accumulator) else accumulator
    return torch.ops.altgrad.matmul(a, b, name, a_scale, b_scale)
