"""Simulated training: the matrix products of a model in small formats, forward and backward."""

from .functions import attention, conv, linear, matmul
from .published import RECIPES
from .recipes import Product, Recipe, Rule
from .state import SimulationState, advance

__all__ = [
    "RECIPES",
    "Product",
    "Recipe",
    "Rule",
    "SimulationState",
    "advance",
    "attention",
    "conv",
    "linear",
    "matmul",
]
