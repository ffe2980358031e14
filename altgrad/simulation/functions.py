"""Simulated products as functions, with the arguments of torch's and a recipe behind the tensors.

Under autocast they cast as torch's do. A stochastic recipe draws its seeds from torch's default generator where no
state is given; delayed scaling needs a state.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from ops_registry.checks import check_tensor
from ops_registry.sharding import shared_seed

from .products import ProductState, is_autocast, product
from .published import as_recipe
from .recipes import Recipe


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    recipe: Recipe | str = "mxfp8",
    *,
    state: ProductState | None = None,
) -> Tensor:
    """``x weight^T + bias``, with operands quantized by a recipe, in the backward pass too.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64. Blocks along the tokens run over all dimensions but the last
            one, flattened.
        weight: [N, K], of x's dtype.
        bias: [N]; it and its gradient stay in high precision.
        recipe: a :class:`Recipe` or the name of one in RECIPES.
        state: seeds and delayed scales: what ``SimulationState.of()`` gives.

    Returns:
        [..., N] in x's dtype: accumulated in float32 (float64) and rounded once.

    Raises:
        TypeError: tensors of different dtypes or no floating point.
        ValueError: an unknown recipe, a recipe with delayed scaling without a state, shapes that do not multiply.
        RuntimeError: a second differentiation.

    Example:
        >>> import torch
        >>> from altgrad.simulation import linear
        >>> linear(torch.tensor([[1.1, 300.0]]), torch.tensor([[1.0, 0.0]]), recipe="mxfp4")
        tensor([[0.]])
    """
    x, weight, bias = _cast(x=x, weight=weight, bias=bias)
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x [..., K] and weight [N, K] must share K, got {tuple(x.shape)} and {tuple(weight.shape)}")
    _check_bias(bias, weight, "features out")
    y = _product(x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0), weight, bias, recipe, state)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def matmul(a: Tensor, b: Tensor, recipe: Recipe | str = "mxfp8", *, state: ProductState | None = None) -> Tensor:
    """``a @ b`` as :func:`torch.matmul`, with operands quantized by a recipe; b takes the place of the weight.

    A scale "per tensor" is one for all matrices of a batch. Arguments and errors are those of :func:`linear`.

    Args:
        a: [..., M, K] or [K].
        b: [..., K, N] or [K]; the dimensions in front broadcast.

    Example:
        >>> import torch
        >>> from altgrad.simulation import matmul
        >>> matmul(torch.tensor([[1.1, 6.0]]), torch.tensor([[1.0], [0.5]]), "mxfp4")
        tensor([[4.]])
    """
    a, b = _cast(a=a, b=b)
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"a [..., M, K] and b [..., K, N] must share K, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim == 1:
        return matmul(a.unsqueeze(0), b, recipe, state=state).squeeze(-2 if b.ndim > 1 else -1)
    if b.ndim == 1:
        return matmul(a, b.unsqueeze(1), recipe, state=state).squeeze(-1)
    if b.ndim == 2:
        return linear(a, b.mT, None, recipe, state=state)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (t.expand(*batch, *t.shape[-2:]).flatten(0, -3) for t in (a, b))
    return _product(a, b.mT, None, recipe, state).unflatten(0, batch)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    recipe: Recipe | str = "mxfp8",
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    state: ProductState | None = None,
) -> Tensor:
    """A convolution in one to three dimensions as :func:`torch.nn.functional.conv2d`, by a recipe.

    It is the product of unfolded patches [batch * positions, C * kernel] with the weight [N, C * kernel], C counting
    the channels of a group: the forward product contracts channels times kernel, ``grad_input`` output channels and
    ``grad_weight`` batch times positions. What patches share is added up in x's dtype. The patches are a copy, as many
    times x as the kernel has elements, which the backward pass keeps.

    Args:
        x: [batch, C * groups, ...] or [C * groups, ...].
        weight: [N, C, *kernel], of x's dtype.
        stride, padding, dilation, groups: as in torch; padding also ``"same"`` or ``"valid"``.
        bias, recipe, state: as in :func:`linear`, and so are the errors.

    Returns:
        [batch, N, ...] or [N, ...] in x's dtype: contiguous, or channels_last where x or weight is and groups is 1.

    Example:
        >>> import torch
        >>> from altgrad.simulation import conv
        >>> conv(torch.ones(1, 1, 3), torch.ones(1, 1, 3), recipe="nvfp4", padding=1)
        tensor([[[2., 3., 2.]]])
    """
    x, weight, bias = _cast(x=x, weight=weight, bias=bias)
    sizes = weight.shape[2:]
    d = len(sizes)
    is_image = 1 <= d <= 3 and x.ndim in (d + 1, d + 2)
    if not is_image or groups < 1 or x.shape[-d - 1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"x [batch, channels, ...] and weight [out, channels / groups, *kernel] must agree, "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and groups={groups}"
        )
    if x.ndim == d + 1:
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "state": state}
        return conv(x.unsqueeze(0), weight, bias, recipe, **options).squeeze(0)  # type: ignore[arg-type]
    _check_bias(bias, weight, "output channels")
    steps = _sizes("stride", stride, d, 1)
    if padding == "same" and any(step != 1 for step in steps):
        raise ValueError(f"padding='same' needs a stride of 1, got {stride!r}")
    columns, positions = _patches(x, sizes, steps, padding, _sizes("dilation", dilation, d, 1), groups)
    rows = weight.reshape(groups, weight.shape[0] // groups, columns.shape[-1])
    if groups == 1:
        y = _product(columns[0], rows[0], bias, recipe, state).unsqueeze(0)
    else:
        y = _product(columns, rows, None if bias is None else bias.view(groups, 1, -1), recipe, state)
    y = y.unflatten(1, (x.shape[0], prod(positions))).permute(1, 0, 3, 2)  # batch, group, channel of it, position
    y = y.reshape(x.shape[0], weight.shape[0], *positions)
    is_channels_last = d > 1 and any(t.stride(1) == 1 and not t.is_contiguous() for t in (x, weight))
    return y if is_channels_last else y.contiguous()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recipe: Recipe | str = "mxfp8",
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    states: tuple[ProductState | None, ProductState | None] = (None, None),
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention` with both products by a recipe.

    ``query key^T`` and ``weights value`` are a :func:`matmul` each; the softmax between them is in high precision. The
    weights are there in full, as in torch's math implementation.

    Args:
        query, key, value: [..., L, E], [..., S, E], [..., S, V].
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as in torch.
        recipe: as in :func:`linear`, and so are the errors.
        states: of the two products.

    Example:
        >>> import torch
        >>> from altgrad.simulation import attention
        >>> attention(torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4), is_causal=True).shape
        torch.Size([1, 2, 4])
    """
    query, key, value = _cast(query=query, key=key, value=value)
    if is_causal and attn_mask is not None:
        raise ValueError("give attn_mask or is_causal, not both")
    if attn_mask is not None:
        check_mask("attn_mask", attn_mask)
    if enable_gqa:
        heads = [t.shape[-3] for t in (query, key, value)]
        if any(heads[0] % n for n in heads[1:]):
            raise ValueError(
                f"enable_gqa needs heads of query that are multiples of those of key and value, got {heads}"
            )
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = matmul(query, key.mT, recipe, state=states[0]) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_choice = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_choice else scores + attn_mask.to(scores.dtype)
    weights = dropout(scores.softmax(-1) if attn_mask is None or is_causal else softmax(scores), dropout_p)
    return matmul(weights, value, recipe, state=states[1])


def check_mask(name: str, mask: Tensor) -> None:
    check_tensor(name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean or floating point, got {mask.dtype}")


def softmax(scores: Tensor) -> Tensor:
    """Along the last dimension; 0 where all scores are -inf, as in torch's attention, and so are the gradients."""
    is_empty = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(is_empty, 0.0).softmax(-1).masked_fill(is_empty, 0.0)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, recipe: Recipe | str, state: ProductState | None) -> Tensor:
    recipe = as_recipe(recipe)
    if not isinstance(state, ProductState | None):
        raise TypeError(f"state must be what SimulationState.of() gives, got a {type(state).__name__}")
    if state is None:
        if recipe.history:
            raise ValueError(
                f"delayed scaling needs a state: simulate a module, or give a SimulationState({recipe.name!r})"
            )
        state = ProductState()
        if recipe.is_stochastic:
            state = ProductState(shared_seed(a, torch.randint(1 << 62, (len(recipe.rules),), device=a.device)))
    return product(a, b, bias, recipe, state)


def _cast(**arguments: Any) -> list[Any]:
    """The tensors as autocast wants them; checks that they have one floating-point dtype. A bias may be None."""
    tensors = {name: t for name, t in arguments.items() if name != "bias" or t is not None}
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    x, *others = tensors.values()
    device = x.device.type
    if is_autocast(device) and x.is_floating_point() and x.dtype != torch.float64:
        return [None if t is None else t.to(torch.get_autocast_dtype(device)) for t in arguments.values()]
    if not x.is_floating_point() or any(t.dtype != x.dtype for t in others):
        dtypes = ", ".join(str(t.dtype) for t in tensors.values())
        raise TypeError(f"{', '.join(tensors)} must have one floating-point dtype, got {dtypes}")
    return list(arguments.values())


def _check_bias(bias: Tensor | None, weight: Tensor, outputs: str) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], as weight has {outputs}, got {tuple(bias.shape)}")


def _patches(
    x: Tensor,
    sizes: Sequence[int],
    stride: tuple[int, ...],
    padding: int | str | Sequence[int],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, list[int]]:
    """What each output position sees, [groups, batch * positions, channels of a group * kernel], and the positions."""
    d = len(sizes)
    spans = [step * (size - 1) + 1 for size, step in zip(sizes, dilation)]
    if padding == "same":
        sides = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans]
    else:
        around = 0 if padding == "valid" else padding
        if isinstance(around, str):
            raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
        sides = [(side, side) for side in _sizes("padding", around, d, 0)]
    if any(map(any, sides)):
        x = pad(x, [side for pair in reversed(sides) for side in pair])
    if any(span > size for span, size in zip(spans, x.shape[2:])):
        raise ValueError(f"weight spans {spans}, more than x with its padding, {[*x.shape[2:]]}")
    for i in range(d):
        x = x.unfold(2 + i, spans[i], stride[i])[..., :: dilation[i]]
    positions = list(x.shape[2 : 2 + d])
    x = x.unflatten(1, (groups, -1))  # batch, group, channel, positions, kernel
    x = x.permute(1, 0, *range(3, 3 + d), 2, *range(3 + d, 3 + 2 * d))
    return x.reshape(groups, x.shape[1] * prod(positions), x.shape[2 + d] * prod(sizes)), positions


def _sizes(name: str, value: int | Sequence[int], d: int, least: int) -> tuple[int, ...]:
    """A size for each dimension from one or from as many."""
    sizes = tuple(value) if isinstance(value, Iterable) else (value,)
    if len(sizes) not in (1, d) or any(size < least for size in sizes):
        raise ValueError(f"{name} must be one or {d} integers of at least {least}, got {value!r}")
    return sizes * (d // len(sizes))
