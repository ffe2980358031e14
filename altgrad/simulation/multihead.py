"""nn.MultiheadAttention with simulated projections and, if asked for, simulated products of attention."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, pad

from .functions import check_mask, linear, matmul, softmax

PROJECTIONS = 3
PRODUCTS = 5  # with the two of attention


def products_of_attention(layer: Any, attention: bool) -> int:
    return PRODUCTS if attention else PROJECTIONS


def attend(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The forward pass of nn.MultiheadAttention.

    Query, key and value have a projection each, also where one weight holds all three; ``out_proj`` is a layer of its
    own, which is called.
    """
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint that goes with attn_mask")
    is_batched = query.ndim == 3
    if not is_batched:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not layer.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    _check_shape("attn_mask", attn_mask, (query.shape[1], key.shape[1]), len(query) * layer.num_heads)
    _check_shape("key_padding_mask", key_padding_mask, (len(key), key.shape[1]))
    q, k, v = _project(layer, query, key, value)
    mask = _mask(attn_mask, key_padding_mask, q, layer.num_heads)
    if layer.bias_k is not None:
        k, v = (torch.cat([t, bias.expand(len(t), 1, -1)], 1) for t, bias in ((k, layer.bias_k), (v, layer.bias_v)))
        mask = None if mask is None else pad(mask, (0, 1))
    if layer.add_zero_attn:
        k, v = (pad(t, (0, 0, 0, 1)) for t in (k, v))
        mask = None if mask is None else pad(mask, (0, 1))
    q, k, v = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = _multiply(layer, q, k.mT, PROJECTIONS) * q.shape[-1] ** -0.5
    if mask is None or need_weights:  # as torch, which shows NaN for a query without keys
        weights = (scores if mask is None else scores + mask).softmax(-1)
    else:
        weights = softmax(scores + mask)
    weights = dropout(weights, layer.dropout, layer.training)
    out = _multiply(layer, weights, v, PROJECTIONS + 1).transpose(1, 2).flatten(-2)
    out = layer.out_proj(out)
    shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
    if not is_batched:
        return out.squeeze(0), None if shown is None else shown.squeeze(0)
    return (out if layer.batch_first else out.transpose(0, 1).contiguous()), shown


def _project(layer: Any, *inputs: Tensor) -> list[Tensor]:
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    recipe, of = layer.simulation.recipe, layer.simulation.of
    return [
        linear(x, w, b, recipe, state=of(i, records=layer.training))
        for i, (x, w, b) in enumerate(zip(inputs, weights, biases))
    ]


def _multiply(layer: Any, a: Tensor, b: Tensor, number: int) -> Tensor:
    if layer.simulation.products <= number:
        return a @ b
    return matmul(a, b, layer.simulation.recipe, state=layer.simulation.of(number, records=layer.training))


def _check_shape(name: str, mask: Tensor | None, shape: tuple[int, int], heads: int | None = None) -> None:
    """Refuses what torch does; a mask for each head of each example is [heads, *shape]."""
    if mask is None:
        return
    check_mask(name, mask)
    if mask.shape not in (shape, (heads, *shape)):
        choices = f"{shape}" if heads is None else f"{shape} or {(heads, *shape)}"
        raise ValueError(f"{name} must be {choices}, got {tuple(mask.shape)}")


def _mask(mask: Tensor | None, padding: Tensor | None, q: Tensor, heads: int) -> Tensor | None:
    """Both masks added up, [batch or 1, heads or 1, L or 1, S]; True is "not attended" in boolean ones."""

    def added(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(q.dtype)
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))

    if mask is not None:
        mask = added(mask)
        mask = mask.unflatten(0, (-1, heads)) if mask.ndim == 3 else mask[None, None]
    if padding is None:
        return mask
    padding = added(padding)[:, None, None]
    return padding if mask is None else mask + padding
