"""Simulated training: the matrix products of a model in small formats, forward and backward."""

from .coverage import Coverage, coverage
from .functions import attention, conv, linear, matmul
from .layers import register
from .model import Simulation, disabled, restore, simulate
from .products import ProductState
from .published import RECIPES
from .recipes import Product, Recipe, Rule
from .state import SimulationState, advance

__all__ = [
    "RECIPES",
    "Coverage",
    "Product",
    "ProductState",
    "Recipe",
    "Rule",
    "Simulation",
    "SimulationState",
    "advance",
    "attention",
    "conv",
    "coverage",
    "disabled",
    "linear",
    "matmul",
    "register",
    "restore",
    "simulate",
]
