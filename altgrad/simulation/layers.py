"""Layers with simulated products: which classes of modules have a form, and how a module changes its class.

A simulated module is of a class derived from its own, so parameters, keys of ``state_dict``, hooks and ``isinstance``
stay as they are. Its state is an attribute named ``simulation``, no submodule: what walks over a model does not meet
it.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .functions import conv, linear
from .multihead import attend, products_of_attention
from .state import SimulationState

LAYOUTS = ("NK", "KN")
# Layers with products that have no simulated form; tables say so.
WITHOUT_FORM = (nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.modules.conv._ConvTransposeNd)


@dataclass(frozen=True)
class Kind:
    """A kind of layer: its forward pass with simulated products, and their weights, the layout of these, and number."""

    name: str
    forward: Callable[..., Any]
    weight: str = "weight"
    products: Callable[[nn.Module, bool], int] = lambda layer, attention: 1
    layout: str = "NK"


def _linear(weight: str, bias: str, layout: str) -> Callable[..., Tensor]:
    def forward(layer: Any, x: Tensor) -> Tensor:
        matrix, state = getattr(layer, weight), layer.simulation
        b = getattr(layer, bias, None)
        return linear(
            x, matrix if layout == "NK" else matrix.mT, b, state.recipe, state=state.of(records=layer.training)
        )

    return forward


def _conv(layer: Any, x: Tensor) -> Tensor:
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    options = {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups}
    state = layer.simulation
    return conv(x, layer.weight, layer.bias, state.recipe, state=state.of(records=layer.training), **options)


# A class, or its qualified name where importing it is too much, -> its kind.
KINDS: dict[type | str, Kind] = {
    nn.Linear: Kind("linear", _linear("weight", "bias", "NK")),
    "transformers.pytorch_utils.Conv1D": Kind("linear", _linear("weight", "bias", "KN"), layout="KN"),
    **{c: Kind(c.__name__.lower(), _conv) for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
    nn.MultiheadAttention: Kind("attention", attend, "in_proj_weight", products_of_attention),
}


def register(cls: type[nn.Module] | str, *, weight: str = "weight", bias: str = "bias", layout: str = "NK") -> None:
    """Makes a class of layers that compute ``x weight^T + bias`` one that :func:`simulate` switches.

    Its subclasses are switched too, unless they have a forward method of their own.

    Args:
        cls: the class, or its qualified name (``"package.module.Class"``).
        weight, bias: the names of its parameters; a layer without the latter has no bias.
        layout: ``"NK"``: the weight is [out, in], as that of nn.Linear; ``"KN"``: [in, out].

    Raises:
        TypeError, ValueError: what is no class of modules, an unknown layout.

    Example:
        >>> import torch
        >>> from altgrad.simulation import register, simulate
        >>> class Dense(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = torch.nn.Parameter(torch.ones(2, 3))
        ...
        ...     def forward(self, x):
        ...         return x @ self.kernel
        >>> register(Dense, weight="kernel", layout="KN")
        >>> layer = Dense()
        >>> _ = simulate(layer, "mxfp4")
        >>> layer(torch.tensor([[1.1, 6.0]])).detach()
        tensor([[7., 7., 7.]])
    """
    if not isinstance(cls, str) and not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class of modules or the qualified name of one, got {cls!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    KINDS[cls] = Kind("linear", _linear(weight, bias, layout), weight, layout=layout)
    simulated_class.cache_clear()


def kind_of(cls: type) -> Kind | None:
    """The kind of layer that a class is, if it has the forward method of a class in KINDS."""
    for base in cls.__mro__:
        kind = KINDS.get(base) or KINDS.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None:
            return kind if cls.forward is base.forward else None  # type: ignore[attr-defined]
    return None


class Simulated:
    """What simulated classes have before the class that they are derived from."""

    simulation: SimulationState

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.simulation._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)  # type: ignore[misc]
        if self.simulation.is_on_meta:
            self.simulation.leave_meta(device_of(self))  # which assign=True changes

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, simulation={self.simulation.extra_repr()}".removeprefix(", ")

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = original_class(type(self))
        return _empty, (base,), self.__getstate__()  # the base may have a __reduce__ without it


@cache
def simulated_class(base: Any) -> Any:
    """The class of simulated modules of a class; pickling and copying go by the class that it is derived from."""
    kind = kind_of(base)
    assert kind is not None
    first = [*signature(base.forward).parameters][1:2]  # each class has its own name for the input

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.simulation.enabled:
            return base.forward(self, *args, **kwargs)
        if self.training:
            _warn_of_export()
        if not torch.compiler.is_compiling() and self.simulation.is_on_meta:
            self.simulation.leave_meta(device_of(self))  # functional_call has weights of its own
        args = *(kwargs.pop(name) for name in first if name in kwargs), *args
        return kind.forward(self, *args, **kwargs)

    return type(f"Simulated{base.__name__}", (Simulated, base), {"forward": forward, "__doc__": base.__doc__})


def _warn_of_export() -> None:
    if torch.compiler.is_exporting() and torch.is_grad_enabled():
        warnings.warn(
            "an exported program has no backward pass of simulated products: their gradients are of high precision or "
            "missing. Train the model itself; for inference export it after eval() or under torch.no_grad()",
            stacklevel=3,
        )


_warn_of_export._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called, as its warning is not traced


def original_class(cls: Any) -> Any:
    """The class that a simulated class is derived from."""
    return cls.__mro__[cls.__mro__.index(Simulated) + 1]


def _empty(base: type) -> Any:
    cls = simulated_class(base)
    return cls.__new__(cls)


def switch(layer: nn.Module, state: SimulationState) -> None:
    layer.__dict__["simulation"] = state
    layer.__class__ = simulated_class(type(layer))  # type: ignore[arg-type]


def switch_back(layer: Any) -> None:
    del layer.__dict__["simulation"]
    layer.__class__ = original_class(type(layer))


def lacks_form(layer: nn.Module) -> bool:
    """Whether it computes products that none of KINDS does: a layer of torch, or one derived from a class in KINDS."""
    derived = any(base is not nn.Module and kind_of(base) for base in type(layer).__mro__)
    return isinstance(layer, WITHOUT_FORM) or (derived and kind_of(type(layer)) is None)


def device_of(layer: Any) -> torch.device:
    return next(layer.parameters()).device


def shape_of(layer: nn.Module, kind: Kind) -> tuple[int, ...]:
    """That of the weight, read as in evaluation: in training spectral_norm changes its buffers whenever it is read."""
    training = [module for module in layer.modules() if module.training]
    try:
        for module in training:
            module.training = False
        weight = getattr(layer, kind.weight)
    finally:
        for module in training:
            module.training = True
    return () if weight is None else tuple(weight.shape)
