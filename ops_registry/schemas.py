"""The operators, one line each: tensors first, everything positional, strings instead of objects."""

import torch

_PROJECTION = 'str format, str saturation="propagate"'
_ROUNDING = 'str rounding="nearest_ties_to_even"'

OPERATORS = {
    "quantize": f"quantize(Tensor x, Tensor scale, {_PROJECTION}, {_ROUNDING}) -> Tensor",
    "quantize_stochastic": f"quantize_stochastic(Tensor x, Tensor scale, Tensor random_bits, {_PROJECTION}) -> Tensor",
    "encode": f"encode(Tensor x, Tensor scale, {_PROJECTION}, {_ROUNDING}) -> Tensor",
    "encode_stochastic": f"encode_stochastic(Tensor x, Tensor scale, Tensor random_bits, {_PROJECTION}) -> Tensor",
    "quantize_gradient": f"quantize_gradient(Tensor x, Tensor scale, {_PROJECTION}, {_ROUNDING}) -> Tensor",
    "quantize_gradient_stochastic": "quantize_gradient_stochastic(Tensor x, Tensor scale, Tensor random_bits, "
    f"{_PROJECTION}) -> Tensor",
    "decode": "decode(Tensor codes, Tensor scale, str format, ScalarType? dtype=None) -> Tensor",
    "dequantize": "dequantize(Tensor x, Tensor scale) -> Tensor",
}

# pointwise lets jagged nested tensors and Inductor's fusion heuristics in; flexible_layout is true because the output's
# layout follows x, and saves a copy where an operator stays opaque.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.pointwise, torch.Tag.flexible_layout)

# The registrations live as long as this object.
library = torch.library.Library("altgrad", "FRAGMENT")
for _schema in OPERATORS.values():
    library.define(_schema, tags=_TAGS)
