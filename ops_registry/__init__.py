"""The altgrad operators: importing this package registers ``torch.ops.altgrad.*`` on every dispatch key.

It needs torch alone, and a program that was exported with the operators needs nothing but this import to load.
"""

from . import operators  # isort: skip  (first: the others register behind it)
from . import aten, autograd, cpu, cuda, fake, functionalize, vmap

__all__ = ["aten", "autograd", "cpu", "cuda", "fake", "functionalize", "operators", "vmap"]
