"""A model switched to simulated products by one call, and back."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from numbers import Integral
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..quantization.granularity import is_integer
from .layers import (
    Kind,
    Simulated,
    device_of,
    kind_of,
    lacks_form,
    original_class,
    shape_of,
    simulated_class,
    switch,
    switch_back,
)
from .published import as_recipe
from .recipes import Recipe
from .state import SimulationState, advance

Choice = Recipe | str | Mapping[str, Any] | None


# The names by which torch's wrappers have what they wrap: checkpoint_wrapper, torch.compile, FSDP, DDP.
_WRAPPERS = "_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module", "module"


class Row(NamedTuple):
    """A layer in the table: recipe is the name of one, or why it stays in high precision."""

    module: str
    kind: str
    shape: tuple[int, ...]
    recipe: str


class Simulation:
    """The simulated layers of a model: what :func:`simulate` gives, or ``Simulation(model)`` of a copied or loaded one.

    Printed it is a table of all layers with products. It holds nothing but the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def states(self) -> dict[str, SimulationState]:
        """The states of the simulated layers by the names of layers, without those of wrappers that came later."""
        now = {name: layer.simulation for name, layer in self.model.named_modules() if isinstance(layer, Simulated)}
        states: dict[str, SimulationState] = {}
        for name, state in now.items():
            is_wrapped = len(name) > len(state.name) and _unwrapped(name) == _unwrapped(state.name)
            is_free = state.name not in now and state.name not in states
            states[state.name if is_wrapped and is_free else name] = state
        return states

    @property
    def rows(self) -> list[Row]:
        rows = []
        unseen = set(_unseen(dict(self.model.named_modules())))
        for name, layer in self.model.named_modules():
            simulated = isinstance(layer, Simulated)
            cls = original_class(type(layer)) if simulated else type(layer)
            kind = kind_of(cls)
            if kind is not None:
                why = "its attention is" if name in unseen else "no pattern, or skipped"
                recipe = layer.simulation.recipe.name if simulated else f"high precision: {why}"
                rows.append(Row(name, kind.name, shape_of(layer, kind), recipe))
            elif lacks_form(layer):
                rows.append(Row(name, cls.__name__, (), "high precision: no simulated form"))
        return rows

    def __str__(self) -> str:
        table = [Row._fields, *((*row[:2], "x".join(map(str, row.shape)), row.recipe) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)

    def step(self, process_group: Any = None) -> None:
        """Ends a step of training, after the optimizer's: new random bits, new scales of delayed scaling.

        See :func:`advance`. Without it every step rounds by the same bits and delayed scales stay.
        """
        advance(self.states.values(), process_group)

    def to_json(self) -> str:
        """The recipe of every simulated layer by name, for :func:`simulate`: ``simulate(model, json.loads(text))``.

        Whether the products of attention are simulated is not in it.
        """
        return json.dumps({name: json.loads(state.recipe.to_json()) for name, state in self.states.items()}, indent=1)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Seeds, steps and histories by layer: what a resumed run needs to go on as the uninterrupted one would."""
        return {
            name: {"seed": state.seed, "step": state.step, **{k: v.clone() for k, v in state.named_buffers()}}
            for name, state in self.states.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes up what :meth:`state_dict` gave.

        Raises:
            ValueError: if the simulated layers or their buffers are others or on the meta device, a seed or step is no
                integer; nothing is loaded then.
        """
        states = self.states
        for name in states.keys() | state_dict.keys():
            ours = {} if name not in states else dict(states[name].named_buffers())
            theirs = state_dict.get(name, {})
            is_one = name in states and ours.keys() | {"seed", "step"} == theirs.keys()
            if name in states and states[name].is_on_meta:
                raise ValueError(f"the state of {name!r} is on the meta device: load the weights of the model first")
            is_one = is_one and is_integer(theirs["seed"]) and is_integer(theirs["step"])
            if not is_one or any(theirs[key].shape != buffer.shape for key, buffer in ours.items()):
                raise ValueError(f"the state of {name!r} does not fit: is the model simulated by the same recipes?")
        for name, state in states.items():
            state.seed, state.step = state_dict[name]["seed"], state_dict[name]["step"]
            for key, buffer in state.named_buffers():
                buffer.copy_(state_dict[name][key])


def simulate(
    model: nn.Module,
    recipe: Choice,
    *,
    skip: Iterable[str] = (),
    seed: int = 0,
    forward_only: bool = False,
    attention: bool = False,
) -> Simulation:
    """Switches the layers of a model, in place, to products that are quantized by a recipe, forward and backward.

    Layers change their class and keep everything else: parameters, keys of ``state_dict``, tied weights, hooks. Covered
    are nn.Linear, nn.Conv1d to 3d, nn.MultiheadAttention, transformers' Conv1D and what :func:`register` was told.
    Call it before ``torch.compile``, DDP and FSDP, and :meth:`Simulation.step` after each step of the optimizer.

    Args:
        model: any module; on any device, the meta device too.
        recipe: a :class:`Recipe`, the name of one in RECIPES, or {pattern: recipe} with shell patterns of module names,
            of which the first that matches decides; None and no match leave a layer in high precision.
        skip: patterns of layers that stay in high precision.
        seed: of all random bits.
        forward_only: gradients in high precision.
        attention: simulate the two products of nn.MultiheadAttention between its projections too.

    Raises:
        TypeError, ValueError: an unknown recipe, a pattern that matches no layer, a model without layers to switch or
            with simulated ones, with a layer that is compiled, quantized, not initialized or has a forward of its own.
            The model is as it was.

    Example:
        >>> import torch
        >>> from altgrad.simulation import simulate
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> print(simulate(model, {"0": "mxfp8", "*": "nvfp4"}))
        module  kind    shape  recipe
        0       linear  16x8   mxfp8
        2       linear  4x16   nvfp4
    """
    _check_model(model)
    if isinstance(skip, str):
        raise TypeError(f"skip must be patterns, a list for one too, got {skip!r}")
    if not isinstance(seed, Integral):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    layers = {name: (layer, kind) for name, layer in model.named_modules() if (kind := kind_of(type(layer)))}
    chosen = _choose(layers, recipe, list(skip))
    if not chosen:
        raise ValueError(
            "no layer of the model is simulated: it has none that can be, none that a pattern matches, or the out_proj "
            "alone of an attention, which does not call it"
        )
    states = {}
    for name, chosen_recipe in chosen.items():
        layer, kind = layers[name]
        if reason := reason_against(layer):
            raise ValueError(f"{name or 'the model'} {reason}")
        simulated_class(type(layer))
        states[name] = SimulationState(
            chosen_recipe.forward_only() if forward_only else chosen_recipe,
            name,
            seed=seed,
            products=kind.products(layer, attention),
            device=device_of(layer),
        )
    for name, state in states.items():
        switch(layers[name][0], state)
    close_fast_paths(model)
    return Simulation(model)


def restore(model: nn.Module) -> None:
    """Undoes :func:`simulate`: every layer has its own class again.

    Raises:
        TypeError, ValueError: no module, a model without simulated layers, or a layer whose class or forward method was
            changed after simulate.

    Example:
        >>> import torch
        >>> from altgrad.simulation import restore, simulate
        >>> model = torch.nn.Linear(8, 16)
        >>> _ = simulate(model, "mxfp8")
        >>> restore(model)
        >>> type(model)
        <class 'torch.nn.modules.linear.Linear'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Simulated)]
    if not layers:
        raise ValueError("the model has no simulated layer")
    for name, layer in layers:
        shown = name or "the model"
        if type(layer).__bases__[0] is not Simulated:
            raise ValueError(f"{shown} became a {type(layer).__name__} after simulate: undo that first")
        if "forward" in vars(layer):
            raise ValueError(f"{shown} got a forward of its own after simulate: undo that first")
    for _, layer in layers:
        switch_back(layer)
    open_fast_paths(model)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """High precision within the context: for an evaluation, say. Compiled code has a version for each.

    Example:
        >>> import torch
        >>> from altgrad.simulation import disabled, simulate
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = simulate(model, "mxfp4")
        >>> x = torch.ones(1, 1)
        >>> with disabled(model):
        ...     print(model(x) == model.weight)
        tensor([[True]])
    """
    states = Simulation(model).states.values()
    _disable(states, 1)
    try:
        yield
    finally:
        _disable(states, -1)


_contexts = Lock()  # of several threads


def _disable(states: Iterable[SimulationState], contexts: int) -> None:
    """Compiled code reads, and is made again for, whether there is one and not how many there are."""
    with _contexts:
        for state in states:
            state.disabling_contexts += contexts
            state.enabled = state.disabling_contexts == 0


def close_fast_paths(model: nn.Module) -> None:
    """In an evaluation torch's encoder layers look past their submodules, unless a hook is there to be called.

    The encoder around them would make nested tensors then, for which there is the fast path alone.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_no_op)
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            module.use_nested_tensor, module.restores_nested_tensor = False, True  # type: ignore[assignment]


def open_fast_paths(model: nn.Module) -> None:
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _no_op]:
            del module._forward_pre_hooks[key]
        if isinstance(module, nn.TransformerEncoder) and hasattr(module, "restores_nested_tensor"):
            del module.restores_nested_tensor
            module.use_nested_tensor = True


def _no_op(module: nn.Module, args: Any) -> None:
    pass


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted model cannot be simulated")
    for name, module in model.named_modules():
        if isinstance(module, Simulated):
            raise ValueError(f"{name or 'the model'} is simulated already: restore the model first")
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            raise ValueError(f"{name or 'the model'} is compiled: simulate first, then compile")


def reason_against(layer: nn.Module) -> str | None:
    """Why a layer of a class in KINDS cannot be simulated."""
    if "forward" in vars(layer):
        return "has a forward of its own, which would be called instead"
    if hasattr(layer, "simulation"):
        return "has an attribute named simulation"
    parameters = list(layer.parameters())
    if not parameters:
        return f"is a {type(layer).__name__} without parameters: is it quantized?"
    if any(is_lazy(parameter) for parameter in parameters):
        return "is not initialized: run the model once"
    dtypes = [parameter.dtype for parameter in parameters if not parameter.is_floating_point()]
    return f"has a weight of {dtypes[0]}: is it quantized?" if dtypes else None


def _choose(layers: Mapping[str, tuple[nn.Module, Kind]], recipe: Choice, skip: list[str]) -> dict[str, Recipe]:
    """The recipes of the layers that get one, by name."""
    is_patterns = isinstance(recipe, Mapping) and (
        not isinstance(recipe.get("name"), str)  # a layer of that name has a recipe, and all have one
        or all(isinstance(value, str | Recipe | None) for value in recipe.values())
    )
    patterns: dict[str, Any] = dict(recipe) if is_patterns else {"*": recipe}  # type: ignore[arg-type]
    for pattern in (*patterns, *skip):
        if not isinstance(pattern, str):
            raise TypeError(f"patterns must be strings, got {pattern!r}")
    recipes = {pattern: None if value is None else as_recipe(value) for pattern, value in patterns.items()}

    def matches(name: str, pattern: str) -> bool:
        """The name of a layer is its own pattern, whatever characters it has, and no other's."""
        return name == pattern or (pattern not in layers and fnmatchcase(name, pattern))

    for pattern in (*(recipes if is_patterns else ()), *skip):
        if not any(matches(name, pattern) for name in layers):
            raise ValueError(
                f"pattern {pattern!r} matches no layer that can be simulated: {', '.join(layers) or 'none'}"
            )
    chosen = {}
    for name in layers:
        if not any(matches(name, pattern) for pattern in skip):
            match = next((value for pattern, value in recipes.items() if matches(name, pattern)), None)
            if match is not None:
                chosen[name] = match
    for name in _unseen({name: layer for name, (layer, _) in layers.items() if name not in chosen}):
        chosen.pop(name, None)
    return chosen


def _unwrapped(name: str) -> list[str]:
    return [part for part in name.split(".") if part and part not in _WRAPPERS]


def _unseen(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The names of layers whose weight torch's attention reads, without calling them."""
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            yield f"{name}.out_proj".removeprefix(".")
