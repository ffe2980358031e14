"""altgrad: simulated small floating-point formats for PyTorch, as first-class dispatcher operators."""

from . import quantization, simulation

__version__ = "0.1.0"
__all__ = ["__version__", "quantization", "simulation"]
