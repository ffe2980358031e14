"""Gradients: straight through for quantize, the adjoint for dequantize and matmul, none for codes and for scales.

``torch.library.register_autograd`` takes the reverse rule alone: what it registers raises under ``torch.func`` and
drops forward-mode tangents without a word (pytorch#168393, #179652). So the kernel of the Autograd key is written here,
on the single-level Function with which functorch runs Functions itself. Those names are private to torch; where one is
missing, ``register_autograd`` takes the same rules, and what :func:`entry` gives covers the transforms with Functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

from .accumulators import resolve_accumulator
from .arithmetic import divide
from .cuda import REPEATED
from .operators import library
from .products import of_products

try:
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    SERVES_TRANSFORMS = True
except ImportError:
    SERVES_TRANSFORMS = False


def transforms_are_active() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiated(x: Tensor) -> Tensor:
    """x for a Function, which Dynamo leaves out with its backward where no tensor is known to require a gradient.

    Of what torch.func differentiates by Dynamo does not know it, but of what is made of that (torch 2.13).
    """
    return x.view_as(x) if torch.compiler.is_dynamo_compiling() and transforms_are_active() else x


class Rule(NamedTuple):
    """What an operator does to gradients: backward gives those of its first arguments, and all others get None."""

    backward: Callable[[Any, Tensor], tuple[Tensor | None, ...]]
    jvp: Callable[..., Tensor | None]  # of ctx and the tangents of the first arguments
    saves: slice = slice(0)  # which of the arguments, where they are tensors
    arguments: int = 1  # how many have gradients


def _alias(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    return (grad,)  # the incoming gradient itself: no copy, no kernel


def _view(ctx: Any, tangent: Tensor) -> Tensor:
    return tangent.view_as(tangent)  # forward AD refuses the input's own tangent


def _none(ctx: Any, grad: Tensor) -> tuple[None]:
    return (None,)


def _no_tangent(ctx: Any, tangent: Tensor) -> None:
    return None


def _rescale(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    return (_rescaled(ctx, grad),)


def _rescaled(ctx: Any, tangent: Tensor) -> Tensor:
    return torch.ops.altgrad.dequantize(tangent, *ctx.saved_tensors)


def _quantize(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    return (torch.ops.altgrad.quantize(grad, *ctx.saved_tensors, *ctx.options),)


def _quantize_stochastic(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    return (torch.ops.altgrad.quantize_stochastic(grad, *ctx.saved_tensors, *ctx.options),)


def _unscale(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    return (divide(grad, *ctx.saved_tensors).to(grad.dtype),)  # autograd casts it to x's dtype


def _unscale_to_dtype(ctx: Any, tangent: Tensor) -> Tensor:
    dtype = next((option for option in ctx.options if isinstance(option, torch.dtype)), tangent.dtype)
    return divide(tangent, *ctx.saved_tensors).to(dtype)


def _scaled(x: Tensor, scale: Tensor | None, dim: int, scaled: int | None) -> Tensor:
    if scale is None or scaled is None:
        return x
    return x.float() * of_products(scale.float(), scaled, dim, x.shape[dim])


def _matmul(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Both products by the same accumulator; the incoming gradient is not rounded, whatever the operands are."""
    a, b, _, *scales = ctx.saved_tensors
    rule = resolve_accumulator(ctx.options[0])
    scaled = rule.scaled
    of_a, of_b = scales if scaled else (None, None)
    if scaled:
        a, b = _scaled(a, of_a, -1, scaled), _scaled(b, of_b, -2, scaled)
        rule = rule.without_scales
    left, right = rule.formats
    matmul = torch.ops.altgrad.matmul
    grad_a = matmul(grad, b.mT, rule.with_formats(None, right).name)
    grad_b = matmul(a.mT, grad, rule.with_formats(left, None).name)
    return _scaled(grad_a, of_a, -1, scaled).to(a.dtype), _scaled(grad_b, of_b, -2, scaled).to(b.dtype)


def _matmul_tangent(ctx: Any, of_a: Tensor | None, of_b: Tensor | None) -> Tensor | None:
    a, b, _, *scales = ctx.saved_tensors
    if any(scale is not None for scale in scales):
        raise RuntimeError("forward-mode gradients of a product with scales of blocks are not defined")
    rule = resolve_accumulator(ctx.options[0])
    left, right = rule.formats
    matmul = torch.ops.altgrad.matmul
    parts = [] if of_a is None else [matmul(of_a.to(a.dtype), b, rule.with_formats(None, right).name)]
    parts += [] if of_b is None else [matmul(a, of_b.to(b.dtype), rule.with_formats(left, None).name)]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


_SCALE, _SCALE_AND_BITS = slice(1, 2), slice(1, 3)
RULES = {
    "quantize": Rule(_alias, _view),
    "quantize_stochastic": Rule(_alias, _view),
    "quantize_gradient": Rule(_quantize, _view, _SCALE),
    "quantize_gradient_stochastic": Rule(_quantize_stochastic, _view, _SCALE_AND_BITS),
    "project": Rule(_unscale, _unscale_to_dtype, _SCALE),
    "project_stochastic": Rule(_unscale, _unscale_to_dtype, _SCALE),
    "quantize_blocks": Rule(_alias, _view),
    "quantize_blocks_stochastic": Rule(_alias, _view),
    "dequantize": Rule(_rescale, _rescaled, _SCALE),
    "encode": Rule(_none, _no_tangent),
    "encode_stochastic": Rule(_none, _no_tangent),
    "decode": Rule(_none, _no_tangent),
    "amax": Rule(_none, _no_tangent),
    "as_scale": Rule(_none, _no_tangent),
    "pack": Rule(_none, _no_tangent),
    "unpack": Rule(_none, _no_tangent),
    "matmul": Rule(_matmul, _matmul_tangent, slice(0, 5), arguments=2),
}
_CPU, _CUDA = DispatchKeySet(DispatchKey.CPU), DispatchKeySet(DispatchKey.CUDA)
# Of a call on plain tensors, without a mode: its keys -> those below autograd.
_PLAIN = {
    keys.add(DispatchKey.AutogradFunctionality).raw_repr(): keys for keys in (_CPU, _CUDA, _CUDA.add(DispatchKey.CPU))
}
_NO_GRADIENTS = (None,) * 10  # for the arguments behind the first; autograd ignores the ones too many


_option_keys: dict[tuple[Any, ...], int] = {}


def _save(rule: Rule, ctx: Any, inputs: tuple[Any, ...]) -> None:
    if rule.saves.stop:
        tensors = [x if isinstance(x, Tensor) else None for x in inputs[rule.saves]]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        options = [option for option in inputs if not isinstance(option, Tensor)]
        ctx.options = tuple(tuple(option) if isinstance(option, list) else option for option in options)


def _register_public(name: str, rule: Rule) -> None:
    torch.library.register_autograd(
        f"altgrad::{name}",
        lambda ctx, grad: (*rule.backward(ctx, grad), *_NO_GRADIENTS),
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
        return None, None, *rule.backward(ctx, grad), *_NO_GRADIENTS

    def jvp(ctx: Any, modes: None, keyset: None, *tangents: Tensor | None) -> Tensor | None:
        return rule.jvp(ctx, *tangents[: rule.arguments])

    def _compiled_autograd_key(ctx: Any) -> tuple[Any, ...]:
        # Of integers; options are baked into the code of a compiled backward pass.
        options = getattr(ctx, "options", ())
        return ctx._autograd_function_id, _option_keys.setdefault(options, len(_option_keys))

    members = {f.__name__: staticmethod(f) for f in (forward, backward, jvp, _compiled_autograd_key)}
    function: Any = type(name.title().replace("_", ""), (_SingleLevelFunction,), members)

    redispatch, repeat = op._handle.redispatch_boxed, REPEATED.get(name)
    is_grad_enabled, any_requires_grad = torch.is_grad_enabled, torch._C._any_requires_grad
    types = [str(argument.type) for argument in op._schema.arguments]
    tensors = slice(1 + max(place for place, kind in enumerate(types) if "Tensor" in kind))  # none is behind them

    def kernel(keyset: Any, *args: Any) -> Tensor:
        if transforms_are_active():
            modes = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
            with enable_single_level_autograd_function():
                return function.apply(modes, keyset, *args)
        if is_grad_enabled() and any_requires_grad(*args[tensors]):
            return function.apply(None, keyset, *args)
        keys = _PLAIN.get(keyset.raw_repr())
        if keys is None:
            return below_autograd(keyset, args)
        # A second kernel in Python takes as long as a launch does.
        if keys is not _CPU and repeat is not None and (output := repeat(*args)) is not None:
            return output
        return redispatch(keys, *args)

    library.impl(name, kernel, "Autograd", with_keyset=True)


# Without gradients, these need no Python on the way to their kernel, which costs as much as the launch of one.
WITHOUT_GRADIENTS = (
    *("quantize_operand", "quantize_operand_stochastic", "quantize_operands"),
    *("encode_blocks", "encode_blocks_stochastic"),
)
for _name in WITHOUT_GRADIENTS:
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")

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
        return *rule.backward(ctx, grad), *_NO_GRADIENTS

    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        return rule.jvp(ctx, *tangents[: rule.arguments])

    members = {f.__name__: staticmethod(f) for f in (forward, setup_context, backward, jvp)}
    return type("Entry", (torch.autograd.Function,), members | {"generate_vmap_rule": True})
