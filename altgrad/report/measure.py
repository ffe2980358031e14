"""The report of a model on data: weights, activations and gradients, each operand of each product.

The layers run their products by :mod:`altgrad.simulation` with a recipe that rounds nothing, and say what the operands
are: those that ``simulate`` will round, in its orientation, rows by contraction.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..simulation import Recipe, SimulationState
from ..simulation.coverage import unchanged
from ..simulation.layers import Kind, Simulated, kind_of, lacks_form, switch, switch_back
from ..simulation.model import close_fast_paths, open_fast_paths, reason_against
from ..simulation.watch import recorders
from .candidates import DEFAULT, Candidate, candidates_of
from .results import Layer, LeftOut, Report
from .tally import Signal, Tally, add, empty_tally, largest_of, parts, scale_function

OPERANDS = ("forward.x", "forward.w", "grad_input.dy", "grad_input.w", "grad_weight.dy", "grad_weight.x")
Loss = Callable[[nn.Module, Any], Tensor]


def measure(
    model: nn.Module, batches: Iterable[Any], loss: Loss, candidates: Iterable[str] = DEFAULT, *, samples: int = 0
) -> Report:
    """What each candidate does to each operand of the three products of each layer, in one pass over the data.

    ``y = x w^T`` has the operands x [tokens, in] and w [out, in]; ``dx = dy w`` has dy [tokens, out] and w [in, out];
    ``dw = dy^T x`` has dy [out, tokens] and x [in, tokens]: a scale of a row or block runs along the last, which the
    product contracts. Layers are those that :func:`altgrad.simulation.simulate` can switch. For the operands of the
    forward product a sensitivity says what an error does to the loss: the sum of squared gradient times squared error,
    the mean over batches; ``samples / 2`` times it estimates by how much the loss grows. Of a layer that got no tokens
    (an expert of a mixture) the weight alone is reported, with a sensitivity of 0. The weight of a layer that is called
    several times is one, with the sum of its gradients. Backward passes inside loss (of an attack, say) do not count.

    Nothing is changed: gradients are not accumulated, buffers and the state of random generators are restored. Compiled
    parts run without their compiled code. Beside the model a float32 copy of all weights is needed. The same model and
    batches give the same report.

    Args:
        model: any module; its mode (train, eval) is kept.
        batches: what loss takes.
        loss: (model, batch) -> 0-d tensor, the mean loss of a batch.
        candidates: names or spellings, see :func:`candidate`.
        samples: how many terms a batch's loss is the mean of. 0: as many as the model's output has in all dimensions
            but the last, or in its only one; without such an output (loss calls parts of the model) 1, with a warning.

    Raises:
        TypeError: model is no module, candidates no list of strings, samples no integer.
        ValueError: an unknown candidate, negative samples, no batches, a model without such layers, with simulated ones
            or without gradients.
        RuntimeError: a batch on which the model or the loss failed.

    Example:
        >>> import torch
        >>> from altgrad.report import measure
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> torch.nn.init.ones_(model.weight).requires_grad
        True
        >>> batches = [torch.tensor([[1.0, 100.0]])]
        >>> report = measure(model, batches, lambda model, x: model(x).sum(), ["E2M1", "E4M3"])
        >>> [score.flushed for score in report.layers[0].scores.values()]
        [0.5, 0.0]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if isinstance(samples, bool) or not isinstance(samples, Integral):
        raise TypeError(f"samples must be an integer, got {samples!r}")
    if samples < 0:
        raise ValueError(f"samples must be 0 or more, got {samples}")
    chosen = candidates_of(candidates)
    layers, left_out = _layers_of(model)
    recording = _Recording(chosen)
    total, count = 0.0, 0
    sizes: list[float] = []
    with _recorded(model, layers, recording), _sizes(model, sizes):
        leaves = [p for p in model.parameters() if p.requires_grad]
        if not leaves:
            raise ValueError("no parameter of the model requires a gradient")
        for batch in batches:
            try:
                value = loss(model, batch)
                with recording.counting():
                    torch.autograd.grad(value, leaves, allow_unused=True)
                total += float(value.detach())
            except Exception as error:
                line = str(error).strip().partition("\n")[0]
                raise RuntimeError(f"the model failed on batch {count}: {type(error).__name__}: {line}") from error
            recording.end_batch()
            count += 1
    if count == 0:
        raise ValueError("batches must not be empty")
    found = recording.layers(count)
    if not found:
        raise ValueError("no gradient reached a layer")
    for name in layers.keys() - {layer.name for layer in found}:
        left_out[name] = "no gradient reached it" if name in recording.names else "it was not called"
    if not samples and not sizes:
        warn("no output of the model says how many samples a batch has: give samples, or it counts as 1", stacklevel=2)
    reasons = [LeftOut(name, left_out[name]) for name, _ in named_modules(model) if name in left_out]
    mean_size = samples or (sum(sizes) / len(sizes) if sizes else 1)
    return Report(type(model).__name__, [c.name for c in chosen], found, reasons, total / count, mean_size)


@dataclass
class _Operand:
    """What was counted of an operand so far."""

    shape: tuple[int, ...]
    dtype: str
    signal: Signal
    tallies: list[Tally]
    bits: list[float]

    def add(self, x: Tensor, chosen: list[Candidate], gradient: Tensor | None) -> None:
        """Counts x [..., rows, contraction]; gradient as in :func:`add`."""
        x = x.detach()
        if x.ndim > 2 and all(isinstance(c.rule.per, str) or c.rule.block[0] == 1 for c in chosen):
            x, gradient = x.flatten(0, -2), None if gradient is None else gradient.flatten(0, -2)
        largest = largest_of(x)
        functions = [scale_function(largest, c) for c in chosen]
        stack = x.reshape(-1, *x.shape[-2:])
        of_stack = None if gradient is None else gradient.reshape(stack.shape)
        for index, matrix in enumerate(stack):
            gradients = None if of_stack is None else parts(of_stack[index], chosen)
            for part in parts(matrix, chosen):
                self.signal.add(part)
                of_part, wide = None if gradients is None else next(gradients), part.double()
                for tally, c, scale_of in zip(self.tallies, chosen, functions):
                    add(tally, part, wide, c, scale_of, of_part)
        for i, c in enumerate(chosen):  # blocks do not span matrices
            rows = x.numel() // x.shape[-1] if isinstance(c.rule.per, str) else x.shape[-2]
            self.bits[i] += x.numel() * c.bits(rows, x.shape[-1])


@dataclass
class _Weight:
    """A weight, and the root of its squared gradients of all batches; of this batch the gradient so far."""

    value: Tensor
    gradient: Tensor
    norm: Tensor


@dataclass
class _Recording:
    """Hears of products, and counts their operands."""

    chosen: list[Candidate]
    operands: dict[tuple[str, str], _Operand] = field(default_factory=dict)
    weights: dict[tuple[str, int], _Weight] = field(default_factory=dict)  # by the product that they are of
    names: set[str] = field(default_factory=set)
    counts: bool = False

    def hear(self, x: Tensor, w: Tensor, recipe: Recipe, number: int, y: Tensor) -> None:
        """x [..., tokens, in], w [..., out, in]; the recipe's name is that of the layer."""
        if recipe != Recipe(recipe.name):  # a product that the model's code calls with a recipe of its own
            return
        self.names.add(recipe.name)
        if y.requires_grad:
            # Autograd does not keep the input of a frozen weight, so the model may write to it before the hook runs.
            x = x.detach() if w.requires_grad else x.detach().clone()
            y.register_hook(partial(self.count, recipe.name, number, x, w.detach()))

    @contextmanager
    def counting(self) -> Iterator[None]:
        self.counts = True
        try:
            yield
        finally:
            self.counts = False

    def count(self, name: str, index: int, x: Tensor, w: Tensor, dy: Tensor) -> None:
        if not self.counts:
            return
        with torch.no_grad():
            g, compute = dy.detach(), torch.promote_types(dy.dtype, torch.float32)
            self.add(name, "forward.x", x, g.to(compute) @ w.to(compute))
            self.add(name, "grad_input.dy", g)
            self.add(name, "grad_weight.dy", g.mT)
            self.add(name, "grad_weight.x", x.mT)
            if (name, index) not in self.weights:
                zeros = (torch.zeros(w.shape, dtype=compute, device=w.device) for _ in range(2))
                self.weights[name, index] = _Weight(w, *zeros)
            self.weights[name, index].gradient += g.to(compute).mT @ x.to(compute)

    def add(self, name: str, operand: str, x: Tensor, gradient: Tensor | None = None) -> None:
        if x.numel() == 0:
            return
        if (name, operand) not in self.operands:
            tallies = [empty_tally(c) for c in self.chosen]
            shape, dtype = tuple(x.shape), str(x.dtype).removeprefix("torch.")
            self.operands[name, operand] = _Operand(shape, dtype, Signal(), tallies, [0.0] * len(tallies))
        self.operands[name, operand].add(x, self.chosen, gradient)

    def end_batch(self) -> None:
        for weight in self.weights.values():
            weight.norm.hypot_(weight.gradient)  # squares would leave the range of float32
            weight.gradient.zero_()

    def layers(self, batches: int) -> list[Layer]:
        """A layer of the report for each operand, in the order of the layers' first gradients reversed."""
        for (name, _), weight in self.weights.items():
            self.add(name, "forward.w", weight.value, weight.norm)
            self.add(name, "grad_input.w", weight.value.mT)
        names = list(dict.fromkeys(name for name, _ in self.weights))[::-1]
        found = ((name, operand) for name in names for operand in OPERANDS)
        return [self.layer(*key, batches) for key in found if key in self.operands]

    def layer(self, name: str, operand: str, batches: int) -> Layer:
        counted = self.operands[name, operand]
        signal = counted.signal
        scores = {}
        for c, tally, bits in zip(self.chosen, counted.tallies, counted.bits):
            if tally.sensitivity is not None:
                tally.sensitivity /= batches
            scores[c.name] = tally.score(signal, bits / signal.count)
        numbers = (signal.count, signal.zeros, signal.nan, signal.infinite, signal.octaves())
        return Layer(name, operand, counted.shape, counted.dtype, *numbers, scores)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by the names that they have where no part is compiled, without what compilation wraps around them."""
    for name, module in model.named_modules():
        if type(module).__name__ != "OptimizedModule":
            yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def _layers_of(model: nn.Module) -> tuple[dict[str, tuple[nn.Module, Kind]], dict[str, str]]:
    """The layers that can be simulated, and why others cannot."""
    layers: dict[str, tuple[nn.Module, Kind]] = {}
    left_out: dict[str, str] = {}
    for name, layer in named_modules(model):
        if isinstance(layer, Simulated):
            raise ValueError(f"{name or 'the model'} is simulated: restore the model first")
        if (kind := kind_of(type(layer))) is None:
            left_out |= {name: "no simulated form"} if lacks_form(layer) else {}
        elif reason := reason_against(layer):
            left_out[name] = f"it {reason}"
        else:
            layers[name] = layer, kind
    if not layers:
        reasons = [f": {name or 'the model'}, {reason}" for name, reason in left_out.items()]
        raise ValueError("the model has no layer that can be simulated" + "".join(reasons[:1]))
    return layers, left_out


@contextmanager
def _recorded(model: nn.Module, layers: Mapping[str, tuple[nn.Module, Kind]], recording: _Recording) -> Iterator[None]:
    """The model with layers that the recording hears of; everything is restored."""
    switched: list[nn.Module] = []
    recorders.append(recording.hear)
    try:
        for name, (layer, kind) in layers.items():
            switch(layer, SimulationState(Recipe(name), name, products=kind.products(layer, False)))
            switched.append(layer)
        close_fast_paths(model)
        with unchanged(model), torch.enable_grad():
            yield
    finally:
        recorders.remove(recording.hear)
        for layer in switched:
            switch_back(layer)
        open_fast_paths(model)


@contextmanager
def _sizes(model: nn.Module, sizes: list[float]) -> Iterator[None]:
    """Collects how many rows the model's outputs have, vectors how many numbers."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = next((t for t in tree_leaves(output) if isinstance(t, Tensor) and t.ndim > 0), None)
        if first is not None:
            sizes.append(first.numel() / (max(first.shape[-1], 1) if first.ndim > 1 else 1))

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
