"""Gradients: straight through for quantize, the adjoint for dequantize, none for codes and for scales.

``torch.library.register_autograd`` takes the reverse rule alone: what it registers raises under ``torch.func`` and
drops forward-mode tangents without a word (pytorch#168393, #179652). So the kernel of the Autograd key is written here,
on the single-level Function with which functorch runs Functions itself. Those names are private to torch; where one is
missing, ``register_autograd`` takes the same rules, and what :func:`entry` gives covers the transforms with Functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .arithmetic import divide
from .operators import OPERATORS, library

try:
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    SERVES_TRANSFORMS = True
except ImportError:
    SERVES_TRANSFORMS = False


def transforms_are_active() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Rule(NamedTuple):
    """What an operator does to gradients with respect to its first argument; all others get None."""

    backward: Callable[[Any, Tensor], Tensor | None]
    jvp: Callable[[Any, Tensor], Tensor | None]
    saves: int = 0  # how many of the tensors behind the first one


def _alias(ctx: Any, grad: Tensor) -> Tensor:
    return grad  # the incoming gradient itself: no copy, no kernel


def _view(ctx: Any, tangent: Tensor) -> Tensor:
    return tangent.view_as(tangent)  # forward AD refuses the input's own tangent


def _none(ctx: Any, grad: Tensor) -> None:
    return None


def _rescale(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.altgrad.dequantize(grad, *ctx.saved_tensors)


def _quantize(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.altgrad.quantize(grad, *ctx.saved_tensors, *ctx.options)


def _quantize_stochastic(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.altgrad.quantize_stochastic(grad, *ctx.saved_tensors, *ctx.options)


def _unscale(ctx: Any, grad: Tensor) -> Tensor:
    return divide(grad, *ctx.saved_tensors).to(grad.dtype)  # autograd casts it to x's dtype


def _unscale_to_dtype(ctx: Any, tangent: Tensor) -> Tensor:
    dtype = next((option for option in ctx.options if isinstance(option, torch.dtype)), tangent.dtype)
    return divide(tangent, *ctx.saved_tensors).to(dtype)


def _unscale_blocks(ctx: Any, grad: Tensor) -> Tensor:
    """Straight through, but for the scale of the tensor where values come without it."""
    if not any(option is True for option in ctx.options):
        return grad
    (tensor_scale,) = ctx.saved_tensors
    return grad if tensor_scale is None else divide(grad, tensor_scale).to(grad.dtype)


def _unscale_blocks_to_dtype(ctx: Any, tangent: Tensor) -> Tensor:
    dtype = next((option for option in ctx.options if isinstance(option, torch.dtype)), tangent.dtype)
    return _unscale_blocks(ctx, tangent).to(dtype).view_as(tangent)


RULES = {
    "quantize": Rule(_alias, _view),
    "quantize_stochastic": Rule(_alias, _view),
    "quantize_gradient": Rule(_quantize, _view, saves=1),
    "quantize_gradient_stochastic": Rule(_quantize_stochastic, _view, saves=2),
    "project": Rule(_unscale, _unscale_to_dtype, saves=1),
    "project_stochastic": Rule(_unscale, _unscale_to_dtype, saves=1),
    "quantize_blocks": Rule(_unscale_blocks, _unscale_blocks_to_dtype, saves=1),
    "quantize_blocks_stochastic": Rule(_unscale_blocks, _unscale_blocks_to_dtype, saves=1),
    "dequantize": Rule(_rescale, _rescale, saves=1),
    "encode": Rule(_none, _none),
    "encode_stochastic": Rule(_none, _none),
    "decode": Rule(_none, _none),
    "amax": Rule(_none, _none),
    "pack": Rule(_none, _none),
    "unpack": Rule(_none, _none),
}
_NO_GRADIENTS = (None,) * 10  # for the arguments behind the first; autograd ignores the ones too many


_option_keys: dict[tuple[Any, ...], int] = {}


def _save(rule: Rule, ctx: Any, inputs: tuple[Any, ...]) -> None:
    if rule.saves:
        tensors = inputs[1 : 1 + rule.saves]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        options = [option for option in inputs[1 + rule.saves :] if not isinstance(option, Tensor)]
        ctx.options = tuple(tuple(option) if isinstance(option, list) else option for option in options)


def _register_public(name: str, rule: Rule) -> None:
    torch.library.register_autograd(
        f"altgrad::{name}",
        lambda ctx, grad: (rule.backward(ctx, grad), *_NO_GRADIENTS),
        setup_context=lambda ctx, inputs, output: _save(rule, ctx, inputs),
        lib=library,
    )


def _register_kernel(name: str, rule: Rule) -> None:
    op = getattr(torch.ops.altgrad, name).default

    def below_autograd(keyset: Any, args: tuple[Any, ...]) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, modes: tuple[bool, bool] | None, keyset: Any, *args: Any) -> Tensor:
        _save(rule, ctx, args)
        if modes is None:
            return below_autograd(keyset, args)
        # A Function switches both modes off; the outer levels of a nest of transforms need them as they were.
        grad_enabled, forward_grad_enabled = modes
        with torch.set_grad_enabled(grad_enabled), forward_ad._set_fwd_grad_enabled(forward_grad_enabled):
            return below_autograd(keyset, args)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, rule.backward(ctx, grad), *_NO_GRADIENTS

    def jvp(ctx: Any, modes: None, keyset: None, tangent: Tensor, *others: None) -> Tensor | None:
        return rule.jvp(ctx, tangent)

    def _compiled_autograd_key(ctx: Any) -> tuple[Any, ...]:
        # Of integers; options are baked into the code of a compiled backward pass.
        options = getattr(ctx, "options", ())
        return ctx._autograd_function_id, _option_keys.setdefault(options, len(_option_keys))

    members = {f.__name__: staticmethod(f) for f in (forward, backward, jvp, _compiled_autograd_key)}
    function: Any = type(name.title().replace("_", ""), (_SingleLevelFunction,), members)

    tensors = OPERATORS[name].tensors

    def kernel(keyset: Any, *args: Any) -> Tensor:
        if transforms_are_active():
            modes = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
            with enable_single_level_autograd_function():
                return function.apply(modes, keyset, *args)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in args[:tensors]):
            return function.apply(None, keyset, *args)
        return below_autograd(keyset, args)

    library.impl(name, kernel, "Autograd", with_keyset=True)


for _name, _rule in RULES.items():
    (_register_kernel if SERVES_TRANSFORMS else _register_public)(_name, _rule)


def entry(name: str) -> Callable[..., Tensor]:
    """What calls an operator with its gradients under every transform: the operator, or a Function where it cannot."""
    op: Callable[..., Tensor] = getattr(torch.ops.altgrad, name)
    if SERVES_TRANSFORMS:
        return op
    function = _function(op, RULES[name])
    return lambda *args: function.apply(*args) if transforms_are_active() else op(*args)


def _function(op: Callable[..., Tensor], rule: Rule) -> Any:
    def forward(*args: Any) -> Tensor:
        return op(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(rule, ctx, inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return rule.backward(ctx, grad), *_NO_GRADIENTS

    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor | None:
        return rule.jvp(ctx, tangent)

    members = {f.__name__: staticmethod(f) for f in (forward, setup_context, backward, jvp)}
    return type("Entry", (torch.autograd.Function,), members | {"generate_vmap_rule": True})
