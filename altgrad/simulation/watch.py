"""Who wants to hear of products before they run: coverage, while it counts."""

from collections.abc import Callable
from typing import Any

observers: list[Callable[[bool | None], Any]] = []


def announce(is_simulated: bool | None) -> None:
    """Says of the next product whether it has a quantized operand; None: it is a transform of operands."""
    for observe in observers:
        observe(is_simulated)
