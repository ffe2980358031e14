"""Which products of a model still run in high precision: counted where none can hide, in the calls of aten."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .layers import Simulated
from .watch import observers

# aten's operators that multiply matrices, by name: mm, addmm, bmm, _scaled_mm, convolution_backward, attention and
# recurrent layers as a whole. A name too many would be listed, one too few would not.
_PRODUCT = re.compile(r"mm|conv|attention|encoder_layer|linear|rnn|lstm|gru|^v?dot$|^(add)?mv$|^addr$")
_NO_PRODUCT = re.compile(r"fused_(lstm|gru)_cell|choice")


class Uncovered(NamedTuple):
    """Products in high precision: where and how often they ran, with the shapes of their tensors."""

    module: str
    direction: str
    operation: str
    shapes: str
    times: int


class Coverage(NamedTuple):
    """What :func:`coverage` found; printed, a table of it.

    uncovered: the products in high precision. simulated: how many products had a quantized operand. total: how many
    products aten was called with; an operator for all of attention counts as one.
    """

    uncovered: list[Uncovered]
    simulated: int
    total: int

    def __str__(self) -> str:
        table = [Uncovered._fields, *(tuple(map(str, row)) for row in self.uncovered)]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table] if self.uncovered else []
        return "\n".join([*lines, f"{self.simulated} of {self.total} products simulated"])


def coverage(model: nn.Module, example: Any, *, backward: bool = True) -> Coverage:
    """Runs a model on an example, forward and backward, and lists every product that ran in high precision.

    Nothing is left behind: gradients are not accumulated, buffers and the state of random generators are restored.
    Compiled parts run without their compiled code. Products between modules belong to the module that they ran in.

    Args:
        model: any module, simulated or not.
        example: its input: a tensor, a tuple of arguments, or a mapping of keywords.
        backward: count the gradients of the sum of all outputs too.

    Example:
        >>> import torch
        >>> from altgrad.simulation import coverage, simulate
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> _ = simulate(model, "mxfp8", skip=["2"])
        >>> print(coverage(model, torch.randn(5, 8)))
        module  direction  operation  shapes         times
        2       forward    addmm      4, 5x16, 16x4  1
        2       backward   mm         5x4, 4x16      1
        2       backward   mm         4x5, 5x16      1
        2 of 5 products simulated
    """
    names = {module: name for name, module in model.named_modules()}
    arguments, keywords = ((), example) if isinstance(example, Mapping) else (example, {})
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    counter = _Counter(names)
    with unchanged(model), counter.attached(), torch.set_grad_enabled(backward), counter:
        outputs, inputs = _requiring_grad(model(*arguments, **keywords)), _requiring_grad((arguments, keywords))
        sums = [t.sum() for t in outputs]
        if backward and sums and (leaves := _leaves(sums, inputs)):
            torch.autograd.grad(sums, leaves, allow_unused=True)
    rows = [Uncovered(*key, times) for key, times in counter.uncovered.items()]
    return Coverage(rows, counter.simulated, counter.simulated + counter.uncovered.total())


class _Counter(TorchDispatchMode):
    """Counts products by module. A backward node has the number that autograd gave it while its module ran."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.running: list[tuple[str, int]] = []
        self.ran: list[tuple[int, int, str]] = []
        self.announced = False
        self.simulated = 0
        self.uncovered: Counter[tuple[str, str, str, str]] = Counter()

    @contextmanager
    def attached(self) -> Iterator[None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.running.append((self.names.get(module, ""), torch._C._autograd._get_sequence_nr()))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            name, begin = self.running.pop()
            self.ran.append((begin, torch._C._autograd._get_sequence_nr(), name))

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        observers.append(self.hear)
        try:
            yield
        finally:
            observers.remove(self.hear)
            for handle in handles:
                handle.remove()

    def hear(self, is_simulated: bool) -> None:
        self.announced = is_simulated

    def place(self) -> tuple[str, str]:
        """The module that runs, or that ran when the running node of the backward pass was made."""
        if self.running:
            return self.running[-1][0], "forward"
        node = torch._C._current_autograd_node()
        if node is None:
            return "", "forward"
        number = node._sequence_nr()
        around = [(end - begin, name) for begin, end, name in self.ran if begin <= number < end]
        return min(around, default=(0, ""))[1], "backward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::") if hasattr(func, "_schema") else str(func)
        name = "mm" if name == "altgrad::matmul" else name
        if "::" not in name and _PRODUCT.search(name) and not _NO_PRODUCT.search(name):
            if self.announced:
                self.simulated += 1
            else:
                shapes = ["x".join(map(str, t.shape)) for t in tree_leaves(args) if isinstance(t, Tensor)]
                self.uncovered[*self.place(), name, ", ".join(shapes)] += 1
            self.announced = False
        return func(*args, **(kwargs or {}))


def _requiring_grad(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]


def _leaves(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """What a backward pass to the inputs would give gradients of: under FSDP other tensors than the parameters."""
    nodes = [t.grad_fn for t in outputs]
    leaves = [t for t in inputs if t.grad_fn is not None]
    seen = {*nodes, *(t.grad_fn for t in leaves)}
    while nodes:
        node: Any = nodes.pop()
        if type(node).__name__ == "AccumulateGrad" and node.variable.requires_grad:
            leaves.append(node.variable)
        following = {of for of, _ in node.next_functions if of is not None} - seen
        seen |= following
        nodes += following
    return leaves


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restores buffers and the state of random generators; compiled parts run without their compiled code."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    states = [layer.simulation for layer in model.modules() if isinstance(layer, Simulated)]
    before = [(buffer, buffer.clone()) for module in (model, *states) for buffer in module.buffers()]
    try:
        with torch.random.fork_rng(list(devices)), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
