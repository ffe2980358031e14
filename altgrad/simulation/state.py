"""What a simulated layer remembers: seeds of stochastic rounding, amax histories of delayed scaling."""

import hashlib
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ops_registry.arithmetic import divide

from ..quantization.formats import resolve
from ..quantization.history import is_distributed, largest_of_ranks
from .products import ProductState
from .published import as_recipe
from .recipes import Recipe


class SimulationState(nn.Module):
    """The state of a layer's products under a recipe: as many of them as the layer has, each with its gradients.

    Seeds follow from (seed, name, product, rule, step), so an eager run, a compiled one, a recomputation and a resumed
    run round alike. Scales of delayed scaling are 1 until a step has seen an amax. Nothing of it is in ``state_dict``;
    it moves with the model, and keeps its dtypes.

    Args:
        recipe: a :class:`Recipe` or the name of one.
        name: of the layer; layers of different names draw different bits.
        seed: of the model.
        products: how many products the layer has.
        device: where it lies.

    Example:
        >>> import torch
        >>> from altgrad.simulation import Recipe, Rule, SimulationState, advance, linear
        >>> state = SimulationState(Recipe("delayed x", (Rule("E4M3", history=4), None)))
        >>> x, w = torch.full((1, 2), 896.0), torch.eye(2)
        >>> linear(x, w, None, state.recipe, state=state.of())  # clips: no amax was seen
        tensor([[448., 448.]])
        >>> advance([state])
        >>> linear(x, w, None, state.recipe, state=state.of())
        tensor([[896., 896.]])
    """

    seeds: Tensor | None
    scales: Tensor | None
    amax: Tensor | None
    backward_amax: Tensor | None
    history: Tensor | None

    def __init__(
        self,
        recipe: Recipe | str,
        name: str = "",
        *,
        seed: int = 0,
        products: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.name, self.seed, self.products = as_recipe(recipe), name, seed, products
        self.step = 0
        self.enabled = True
        self.disabling_contexts = 0
        self.reset(device)

    def reset(self, device: torch.device | str | None = None) -> None:
        """Makes the buffers: no amax seen, the seeds of this step."""
        shape = (self.products, len(self.recipe.rules))
        buffers: dict[str, Tensor | None] = dict.fromkeys(("seeds", "scales", "amax", "backward_amax", "history"))
        if self.recipe.is_stochastic:
            buffers["seeds"] = self.draw().to(device)
        if self.recipe.history:
            options: dict[str, Any] = {"dtype": torch.float32, "device": device}
            buffers["scales"] = torch.ones(shape, **options)
            buffers["amax"] = torch.zeros(shape, **options)
            buffers["backward_amax"] = torch.zeros(shape, **options)
            buffers["history"] = torch.zeros(*shape, self.recipe.history, **options)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def draw(self) -> Tensor:
        """The seeds of this step, int64 on the CPU."""
        words = (
            f"{self.seed}/{self.name}/{product}/{rule}/{self.step}"
            for product in range(self.products)
            for rule in range(len(self.recipe.rules))
        )
        digests = (hashlib.blake2b(word.encode(), digest_size=8).digest() for word in words)
        seeds = [int.from_bytes(digest) >> 1 for digest in digests]
        return torch.tensor(seeds, device="cpu").view(self.products, -1)

    def of(self, product: int = 0, *, records: bool = True) -> ProductState:
        """What a product needs; with records, delayed scaling records its amax: in training, not in an evaluation."""

        def row(buffer: Tensor | None) -> Tensor | None:
            return None if buffer is None else buffer[product]

        recorded = (row(self.amax), self.backward_amax) if records else (None, None)
        return ProductState(row(self.seeds), row(self.scales), *recorded, product)

    @property
    def is_on_meta(self) -> bool:
        """Whether there are buffers without values."""
        return any(buffer is not None and buffer.is_meta for buffer in self._buffers.values())

    def leave_meta(self, device: torch.device) -> None:
        """Makes the buffers where the weights came to lie: off the meta device nothing can be copied."""
        if device.type != "meta" and self.is_on_meta:
            # They outlive a transform, inference mode and fake tensors.
            with torch._C._DisableFuncTorch(), torch.inference_mode(False), unset_fake_temporarily():
                self.reset(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follows a model to another device, but to no other dtype."""
        for buffer in self.buffers():
            device = fn(torch.empty(0, device=buffer.device)).device
            self.leave_meta(device)
            super()._apply(lambda t: t.to(device), recurse)  # type: ignore[no-untyped-call]  # noqa: B023
            break
        return self

    def extra_repr(self) -> str:
        return self.recipe.name + ("" if self.enabled else ", disabled")

    def __getstate__(self) -> dict[str, Any]:
        """A deep copy, or what is pickled, is of no context that this is in."""
        return self.__dict__ | {"enabled": True, "disabling_contexts": 0}


def advance(states: Iterable[SimulationState], process_group: "dist.ProcessGroup | None" = None) -> None:
    """One step of training is over: new seeds, and new scales from the amax of the steps so far.

    Where ``torch.distributed`` is initialized, the largest amax of all ranks of the process group counts: each must
    have the same layers with delayed scaling, and call this. An infinite or NaN amax is not recorded; the one before it
    counts again. As in TransformerEngine a scale stays where no amax of its history is above 0, that of a layer which
    was not called, for example.

    Args:
        states: of the layers, in the same order on each rank.
        process_group: the ranks that agree; None is the default group. A rank without delayed scaling reduces nothing,
            so others would wait for it.

    Raises:
        RuntimeError: on all ranks, if their layers with delayed scaling differ in names, products, histories or order
            when they are first seen. Nothing is changed then.

    Example:
        >>> from altgrad.simulation import SimulationState, advance
        >>> state = SimulationState("nvfp4")
        >>> before = state.seeds.clone()
        >>> advance([state])
        >>> state.step, bool((state.seeds == before).any())
        (1, False)
    """
    states = list(states)
    delayed = sorted((state for state in states if state.recipe.history), key=_kind)
    groups = [list(group) for _, group in groupby(delayed, key=_kind)]
    if groups and is_distributed():
        _check_ranks(groups, process_group)
    for state in states:
        state.step += 1
    drawn = [state for state in states if state.seeds is not None]
    if drawn:
        seeds = torch.cat([state.draw() for state in drawn])  # to be copied to their device at once
        _write("seeds", drawn, seeds)
    for group in groups:
        _record(group, process_group)


_agreed: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()  # by process group: the layers that its ranks have


def _check_ranks(groups: list[list[SimulationState]], process_group: "dist.ProcessGroup | None") -> None:
    """Raises on every rank unless all have these layers, whose amax are reduced by their places; asks them once."""
    if dist.get_rank(process_group) < 0:  # of another group
        return
    layers = [[(state.name, state.products, state.recipe.history) for state in group] for group in groups]
    digest = int.from_bytes(hashlib.blake2b(repr(layers).encode(), digest_size=8).digest()) >> 1
    agreed = _agreed.setdefault(process_group or dist.group.WORLD, set())
    if digest in agreed:
        return
    ends = torch.tensor([digest, -digest], device=groups[0][0].scales.device)  # type: ignore[union-attr]
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=process_group)
    if ends.tolist() != [digest, -digest]:
        names = ", ".join(repr(state.name) for group in groups for state in group)
        raise RuntimeError(
            f"process_group must be ranks with the same layers of delayed scaling in the same order, in a pipeline "
            f"those of a stage: this rank has {names}, another one has others"
        )
    agreed.add(digest)


def _kind(state: SimulationState) -> tuple[int, str]:
    """What the states have in common whose histories are one tensor for a moment."""
    assert state.history is not None
    return state.recipe.history, str(state.history.device)


def _write(name: str, states: list[SimulationState], values: Tensor) -> None:
    """Writes rows of values to the buffers of that name, one after the other."""
    buffers = [getattr(state, name) for state in states]
    values = values.to(buffers[0].device, non_blocking=True)
    torch._foreach_copy_(buffers, list(values.split([state.products for state in states])))


def _record(states: list[SimulationState], process_group: "dist.ProcessGroup | None") -> None:
    """Puts the amax of this step first in the histories, drops the oldest and finds the scales."""
    names = "amax", "backward_amax", "history", "scales"
    amax, of_backward, history, before = (torch.cat([getattr(state, name) for state in states]) for name in names)
    amax = largest_of_ranks(torch.maximum(amax, of_backward), process_group)
    amax = torch.where(amax < torch.inf, amax, history[..., 0])  # also for NaN
    history = torch.cat([amax.unsqueeze(-1), history[..., :-1]], -1)
    rules = [[_reach(rule) for rule in state.recipe.rules] for state in states for _ in range(state.products)]
    reach = torch.tensor(rules, dtype=torch.float32, device=amax.device)
    steps = torch.arange(history.shape[-1], device=amax.device)
    largest = history.masked_fill(steps >= reach[..., 2:], 0.0).amax(-1)
    limits = torch.finfo(torch.float32)
    scales = divide(largest * reach[..., 1], reach[..., 0]).clamp(limits.smallest_normal, limits.max)
    scales = torch.where(largest == 0, before, scales)
    none = torch.zeros_like(amax)
    for name, value in (("history", history), ("scales", scales), ("amax", none), ("backward_amax", none)):
        _write(name, states, value)


def _reach(rule: Any) -> tuple[float, float, int]:
    """The largest value of a rule's format, its headroom, and how many steps its history has."""
    if rule is None or rule.format is None:
        return 1.0, 1.0, 0
    return resolve(rule.format).max_representable_value, rule.headroom, rule.history
