"""A product whose operands are quantized, and the two products of its gradients, whose operands are too."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ops_registry.autograd import differentiated

from ..quantization.magnitudes import is_static
from .operands import (
    Operand,
    State,
    are_made_at_once,
    quantize_both,
    quantize_operand,
    restored,
    stored,
    transposed,
)
from .recipes import Product, Recipe, Rule
from .watch import announce, recorders


class ProductState(NamedTuple):
    """What a product and its gradients need from outside, an element for each of a recipe's six rules.

    seeds: int64, of stochastic rounding. scales: of delayed scaling. amax: the largest magnitudes of this step, for
    delayed scaling; written to by the forward pass where it is given. backward_amax: the same for the backward pass, of
    all products of a layer; number: which of them this one is.
    """

    seeds: Tensor | None = None
    scales: Tensor | None = None
    amax: Tensor | None = None
    backward_amax: Tensor | None = None
    number: int = 0

    def of(self, rule: int) -> State:
        return State(*(None if t is None else t[rule] for t in self[:3]))


def product(a: Tensor, b: Tensor, bias: Tensor | None, recipe: Recipe, state: ProductState) -> Tensor:
    """``a b^T + bias`` and its gradients by a recipe: a [batch, M, K], b [batch, N, K], or both without batch."""
    operands = [None if t is None else differentiated(t) for t in (a, b, bias)]
    y = _Product.apply(*operands, *state, recipe, torch.is_grad_enabled())[0]  # type: ignore[no-untyped-call]
    for record in recorders:
        record(a, b, recipe, state.number, y)
    return y


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        seeds: Tensor | None,
        scales: Tensor | None,
        amax: Tensor | None,
        backward_amax: Tensor | None,
        number: int,
        recipe: Recipe,
        has_backward: bool,
    ) -> tuple[Tensor, ...]:
        rules, state = recipe.forward, ProductState(seeds, scales, amax)
        is_apart = recipe.accumulators[0] is not None
        left = quantize_operand(a, rules.left, rules.hadamard, state.of(0), is_apart=is_apart)
        right = quantize_operand(b, rules.right, rules.hadamard, state.of(1), is_apart=is_apart)
        y = multiply(left, right, rules, a.dtype, bias, recipe.accumulators[0])
        # What is saved must be an input or an output.
        kept = []
        if has_backward and keeps_left(recipe):
            kept.append(stored(left, rules.left) if is_worth_bytes(left.values, b) else left)
        kept += [stored(right, rules.right)] if has_backward and keeps_right(recipe) else []
        # An operand that is kept does not lead to what it came from, so an output does that gradients do not reach.
        origin = [y.new_empty(0)] if kept and not torch.compiler.is_compiling() else []
        return y, *(t for operand in kept for t in operand if t is not None), *origin

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # What the backward pass writes is no view and not written by the forward pass: compiled code would write a copy
        # of what was there then. It is an attribute and not saved: other backward passes may write to it before.
        a, b, bias, seeds, scales, _, ctx.amax, ctx.number, ctx.recipe, _ = inputs
        ctx.has_origin = len(output) > 1 and not torch.compiler.is_compiling()
        ctx.mark_non_differentiable(*output[1 : len(output) - ctx.has_origin])
        ctx.set_materialize_grads(False)
        ctx.bias_ndim = None if bias is None else bias.ndim
        a, b = (None if keeps_left(ctx.recipe) else a), (None if keeps_right(ctx.recipe) else b)
        needs_a, needs_b = ctx.needs_input_grad[1], ctx.needs_input_grad[0]  # each is for the other's gradient
        ctx.save_for_backward(a if needs_a else None, b if needs_b else None, seeds, scales, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        with torch.no_grad():
            gradients = gradients_of(ctx, grad, *ctx.saved_tensors)
        # Compiled backward passes raise by themselves.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            saved = ctx.saved_tensors
            origins = [t for t in (grad, *saved[:2], *saved[len(saved) - ctx.has_origin :]) if t is not None]
            gradients = [None if g is None else _Final.apply(g, *origins) for g in gradients]  # type: ignore[no-untyped-call]
        return *gradients, *(None,) * 7


class _Final(torch.autograd.Function):
    """A gradient that raises where it is differentiated: torch's once_differentiable says nothing under torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *origins: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError("the gradients of a simulated product cannot be differentiated again")


def gradients_of(
    ctx: Any,
    grad: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    seeds: Tensor | None,
    scales: Tensor | None,
    *kept: Tensor,
) -> list[Tensor | None]:
    """The gradients of a, b and bias."""
    recipe: Recipe = ctx.recipe
    state = ProductState(seeds, scales, None if ctx.amax is None else ctx.amax[ctx.number])
    outputs = iter(kept)
    of_forward = recipe.accumulators[0]
    left = read_operand(recipe.forward.left, outputs, of_forward, grad.dtype) if keeps_left(recipe) else None
    right = read_operand(recipe.forward.right, outputs, of_forward, grad.dtype) if keeps_right(recipe) else None
    of_a = of_b = first = second = None
    if all(ctx.needs_input_grad[:2]):
        first, second = both_operands(grad, recipe, state)
    if ctx.needs_input_grad[0]:
        rules, is_apart = recipe.grad_input, recipe.accumulators[1] is not None
        if first is None:
            first = quantize_operand(grad, rules.left, rules.hadamard, state.of(2), is_apart=is_apart)
        other = backward_operand(b, right, rules, state.of(3), grad.dtype, is_apart)
        of_a = multiply(first, other, rules, grad.dtype, accumulator=recipe.accumulators[1])
    if ctx.needs_input_grad[1]:
        rules, is_apart = recipe.grad_weight, recipe.accumulators[2] is not None
        if second is None:
            of_grad = state.of(2 if is_shared(recipe) else 4)
            second = quantize_operand(transposed(grad), rules.left, rules.hadamard, of_grad, is_apart=is_apart)
        other = backward_operand(a, left, rules, state.of(5), grad.dtype, is_apart)
        of_b = multiply(second, other, rules, grad.dtype, accumulator=recipe.accumulators[2])
    return [of_a, of_b, grad.sum(-2, keepdim=ctx.bias_ndim > 1) if ctx.needs_input_grad[2] else None]


def both_operands(grad: Tensor, recipe: Recipe, state: ProductState) -> tuple[Operand | None, Operand | None]:
    """The incoming gradient for both products, where one rounding or one operator makes both operands."""
    rule, transform = recipe.grad_input.left, recipe.grad_weight.hadamard
    if is_shared(recipe):
        shared = quantize_operand(grad, rule, 0, state.of(2), is_apart=recipe.accumulators[1] is not None)
        return shared, shared.transposed
    is_alike = rule == recipe.grad_weight.left and recipe.accumulators[1:] == (None, None)
    if rule is None or not is_alike or recipe.grad_input.hadamard or not are_made_at_once(grad, rule, transform):
        return None, None
    return quantize_both(grad, rule, transform)


def is_worth_bytes(values: Tensor, b: Tensor) -> bool:
    """Whether values that b [..., N, K] multiplies are kept in bytes, if they can be.

    Writing and restoring them takes as long as half of a product with N = 768 in 16 bits (an H200: 4 TB/s, 800
    Tflop/s).
    """
    return values.dtype.itemsize > 2 or not is_static(b.shape[-2]) or b.shape[-2] >= 1024


def keeps_left(recipe: Recipe) -> bool:
    return serves_again(recipe, recipe.forward.left, 2)


def keeps_right(recipe: Recipe) -> bool:
    return serves_again(recipe, recipe.forward.right, 1)


def serves_again(recipe: Recipe, rule: Rule | None, product: int) -> bool:
    """Whether the operand of the forward product is kept for a product of the backward pass, instead of its source."""
    again = recipe.products[product].right
    if again is None or rule is None:
        return False
    same = again == rule and is_one_operand(recipe, rule, 0, product)
    return same or again.source == "forward"


def is_shared(recipe: Recipe) -> bool:
    """Whether the incoming gradient is rounded once for both products."""
    rule = recipe.grad_input.left
    return rule is not None and rule == recipe.grad_weight.left and is_one_operand(recipe, rule, 1, 2)


def is_one_operand(recipe: Recipe, rule: Rule, first: int, second: int) -> bool:
    """Whether an operand of two products is one and the same, transposed."""
    transformed = recipe.products[first].hadamard or recipe.products[second].hadamard
    accumulators = recipe.accumulators[first], recipe.accumulators[second]
    takes_one = rule.per == "tensor" or accumulators == (None, None)
    are_alike = (accumulators[0] is None) == (accumulators[1] is None)  # scales are left out of both or of neither
    return rule.serves_both_directions and takes_one and are_alike and not transformed


def read_operand(rule: Rule | None, tensors: Iterator[Tensor], accumulator: str | None, dtype: torch.dtype) -> Operand:
    """The operand that forward returned as one or two tensors."""
    values = next(tensors)
    scale = next(tensors) if rule is not None and rule.has_outer_scale(accumulator) else None
    return restored(Operand(values, scale), rule, dtype)


def backward_operand(
    source: Tensor | None, kept: Operand | None, rules: Product, state: State, dtype: torch.dtype, is_apart: bool
) -> Operand:
    """The second operand of a product of the backward pass: from the tensor itself, or from the forward operand."""
    if kept is None:
        assert source is not None
        return quantize_operand(transposed(source), rules.right, rules.hadamard, state, is_apart=is_apart)
    if rules.right is None or rules.right.source != "forward":
        return kept.transposed
    if rules.right.format is None and not rules.hadamard and (kept.scale is None or kept.scale.ndim == 0):
        return kept.transposed
    x = kept.values
    if kept.scale is not None:  # in float32: the product of a 16-bit tensor with a number would be rounded
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * kept.scale
    return quantize_operand(transposed(x), rules.right, rules.hadamard, state, dtype, is_apart)


def is_autocast(device: str) -> bool:
    """Whether autocast is enabled on a type of device; the meta device has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def multiply(
    left: Operand,
    right: Operand,
    rules: Product,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    accumulator: str | None = None,
) -> Tensor:
    """``left right^T + bias``, accumulated in float32 (float64) or as told, scaled, rounded once to dtype."""
    announce(rules.is_simulated or accumulator is not None)
    device = left.values.device.type
    if is_autocast(device):  # it would round float32 operands
        with torch.autocast(device, enabled=False):
            return multiply(left, right, rules, dtype, bias, accumulator)
    if accumulator is not None:
        return _accumulate(left, right, accumulator, dtype, bias)
    return _multiply(left, right, rules, dtype, bias)


def _accumulate(left: Operand, right: Operand, accumulator: str, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """As a tensor core has it. Scales enter as in torch._scaled_mm: two of tensors as their product, others in turn."""
    if dtype == torch.float64:
        raise TypeError(f"a layer with accumulator {accumulator!r} must be float16, bfloat16 or float32, got {dtype}")
    a, b = left.values, right.values
    of_blocks = (left.of_blocks, None if right.of_blocks is None else right.of_blocks.mT)
    y = torch.ops.altgrad.matmul(a, b.mT, accumulator, *of_blocks)
    if left.scale is not None and right.scale is not None and left.scale.ndim == right.scale.ndim == 0:
        y = y * (left.scale * right.scale)
    else:
        for scale in (turned(right.scale), left.scale):
            y = y if scale is None else y * scale
    return in_dtype(y if bias is None else y + bias, dtype)


def _multiply(left: Operand, right: Operand, rules: Product, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    a, b = left.values, right.values
    if not rules.is_simulated:
        return linear(a, b, bias) if b.ndim == 2 else a @ b.mT if bias is None else torch.baddbmm(bias, a, b.mT)
    common = torch.promote_types(a.dtype, b.dtype)
    scales = [scale for scale in (left.scale, turned(right.scale)) if scale is not None]
    if common.itemsize == 2 and a.is_cuda:
        if not scales and common == dtype and b.ndim == 2:
            return linear(a, b, bias)
        y = (torch.mm if b.ndim == 2 else torch.bmm)(a.to(common), b.to(common).mT, out_dtype=torch.float32)
    else:
        compute = torch.float64 if common == torch.float64 else torch.float32
        a, b = a.to(compute), b.to(compute)
        if not scales and bias is not None and b.ndim == 2:
            # What a compiler makes of the product and the sum.
            return in_dtype(torch.addmm(bias.to(compute), a, b.mT), dtype)
        y = a @ b.mT
    for scale in scales:
        y = y * scale
    return in_dtype(y if bias is None else y + bias, dtype)


def in_dtype(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in the dtype, and where it has that no second name for y.

    Dynamo returns all that a Function's forward makes. Of a tensor that is returned twice torch 2.11 sends the gradient
    to the last, where nothing comes from: compiled, all gradients were 0.
    """
    return y if y.dtype == dtype else y.to(dtype)


def turned(scale: Tensor | None) -> Tensor | None:
    """A scale of each row [..., N, 1] as one of each column of the product; that of a tensor, or none, as it is."""
    return scale if scale is None or scale.ndim < 2 else transposed(scale)
