"""Who wants to hear of products: coverage before they run, while it counts; a report of their operands."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

observers: list[Callable[[bool], Any]] = []
# Each is called with a and b, the recipe and the number of a product, and with its result.
recorders: list[Callable[[Tensor, Tensor, Any, int, Tensor], Any]] = []


def announce(is_simulated: bool) -> None:
    """Says of the next product whether it has a quantized operand."""
    for observe in observers:
        observe(is_simulated)
