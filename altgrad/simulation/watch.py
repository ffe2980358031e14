"""Who wants to hear of products: coverage before they run, while it counts; a report of their operands."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

observers: list[Callable[[bool], Any]] = []
# Each is called with what product was called with, a and b and the recipe, and with its result.
recorders: list[Callable[[Tensor, Tensor, Any, Tensor], Any]] = []


def announce(is_simulated: bool) -> None:
    """Says of the next product whether it has a quantized operand."""
    for observe in observers:
        observe(is_simulated)
