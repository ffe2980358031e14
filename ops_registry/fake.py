"""What the output of an operator looks like (shape, dtype, strides) once its arguments are checked."""

from collections.abc import Callable
from typing import Any

import torch

from . import first_use
from .operators import OPERATORS, Operator, library


def _fake(operator: Operator) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        first_use.prepare()
        operator.check(*args)
        return operator.output(*args)

    return fake


for _name, _operator in OPERATORS.items():
    torch.library.register_fake(f"altgrad::{_name}", _fake(_operator), lib=library)
