"""The definition of a simulated layer, for tests: operands by tests/reference.py, products in float64.

Arrays in, float64 arrays out. It reads the fields of rules, and shares nothing with altgrad.simulation.
"""

import math

import numpy as np
import reference

from altgrad.quantization import resolve

SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])


def largest(f):
    return np.float32(reference.finite_values(f)[-1])


def blocks_of(rule, shape):
    """(rows, columns) of the groups that share a scale in a matrix."""
    if rule.per == "tensor":
        return shape
    if rule.per == "row":
        return 1, shape[1]
    return rule.per if isinstance(rule.per, tuple) else (1, rule.per)


def power_of_two(amax, f, rule):
    """One E8M0 scale by the rule, from exact exponents."""
    floor_of = lambda x: math.frexp(x)[1] - 1  # noqa: E731
    if amax == 0:
        return 2.0**-127
    if rule == "rceil":
        mantissa, exponent = math.frexp(np.float32(amax) / largest(f))
        exponent -= mantissa == 0.5
    else:
        assert rule == "floor"
        exponent = floor_of(amax) - floor_of(float(largest(f)))
    return 2.0 ** min(max(exponent, -127), 127)


def two_levels(amax, tensor_amax, f, g):
    """A scale in the format g under a float32 one: the product, as a float32."""
    top = np.float32(float(largest(f)) * float(largest(g)))
    tensor_scale = np.float32(tensor_amax) / top if tensor_amax else np.float32(1)
    code = reference.quantize(g, np.array([np.float32(amax) / largest(f)]), tensor_scale)[0]
    smallest = np.float32(2.0 ** (1 - g.bias))
    return max(code, smallest * tensor_scale), tensor_scale


def quantize(x, rule, seed=None, scale=None):
    """x [rows, contraction], float32, by a rule: values times scales, exact in float64."""
    if rule is None or rule.format is None:
        return x.astype(np.float64)
    f, (rows, columns) = resolve(rule.format), blocks_of(rule, x.shape)
    padded = np.pad(x, [(0, -size % block if block else 0) for size, block in zip(x.shape, (rows, columns))])
    random = np.zeros(padded.shape, np.int64)
    if rule.rounding == "stochastic":
        random[: x.shape[0], : x.shape[1]] = reference.random_words(int(seed), x.size).reshape(x.shape) % 2**24
    result = np.zeros(padded.shape)
    tensor_amax = np.abs(x).max(initial=0) * np.float32(rule.headroom)
    for i in range(0, padded.shape[0], rows):
        for j in range(0, padded.shape[1], columns):
            at = slice(i, i + rows), slice(j, j + columns)
            group = padded[at]
            amax = np.abs(group).max(initial=0) * np.float32(rule.headroom)
            divisor, factor = scale_of(amax, tensor_amax, f, rule, scale)
            n = 24 if rule.rounding == "stochastic" else None
            projected = reference.quantize(
                f, group / divisor, np.float32(1), rule.saturation, rule.rounding, random[at], n
            )
            result[at] = projected.astype(np.float64) * factor
    return result[: x.shape[0], : x.shape[1]]


def scale_of(amax, tensor_amax, f, rule, delayed):
    """What a group is divided by (float32), and what its values stand for (float64: the scale itself)."""
    if rule.history or rule.scale is not None:
        fixed = np.float32(delayed if rule.history else rule.scale)
        return fixed, np.float64(fixed)
    if rule.power_of_two is not None:
        scale = power_of_two(float(amax), f, rule.power_of_two)
        return np.float32(scale), scale
    if rule.scale_format is not None:
        g = resolve(rule.scale_format)
        scale, tensor_scale = two_levels(amax, tensor_amax, f, g)
        level = float(reference.quantize(g, np.array([scale / tensor_scale]), np.float32(1))[0])
        return scale, level * np.float64(tensor_scale)
    scale = np.maximum(np.float32(amax) / largest(f), np.finfo(np.float32).tiny) if amax else np.float32(1)
    return scale, np.float64(scale)


def hadamard(x):
    """x diag(signs) H / 4 along the last dimension in blocks of 16, exact in float64, rounded to x's dtype."""
    sylvester = np.array([[1]])
    while len(sylvester) < 16:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    x64 = np.pad(x, [(0, 0), (0, -x.shape[1] % 16)]).reshape(x.shape[0], -1, 16).astype(np.float64)
    return (x64 * SIGNS @ sylvester / 4).reshape(x.shape[0], -1).astype(x.dtype)


def multiply(left, right, product, state, numbers, forward=None):
    """left right^T by a product's rules; forward: the quantized operand that source='forward' means. Also |a| |b|^T."""
    operands = []
    for x, rule, number in zip((left, right), (product.left, product.right), numbers):
        if rule is not None and rule.source == "forward":
            assert rule.format is None and number % 2 == 1
            operands.append(forward)
            continue
        x = hadamard(x) if product.hadamard else x
        operands.append(quantize(x, rule, *(None if s is None else s[number] for s in state)))
    a, b = operands
    return a @ b.T, np.abs(a) @ np.abs(b).T, operands


def layer(x, w, bias, dy, recipe, seeds=None, scales=None):
    """{name: (definition, sum of magnitudes)} for y, dx, dw and db of float32 matrices."""
    state = seeds, scales
    y, size, (qx, qw) = multiply(x, w, recipe.forward, state, (0, 1))
    dx, dx_size, _ = multiply(dy, w.T, recipe.grad_input, state, (2, 3), qw.T)
    dw, dw_size, _ = multiply(dy.T, x.T, recipe.grad_weight, state, (4, 5), qx.T)
    result = {"y": (y, size), "dx": (dx, dx_size), "dw": (dw, dw_size)}
    if bias is not None:
        result["y"] = y + bias, size + np.abs(bias)
        result["db"] = dy.astype(np.float64).sum(0), np.abs(dy).astype(np.float64).sum(0)
    return result
