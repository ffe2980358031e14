"""A recipe for each layer under a budget of bits: the choice with the least predicted loss, by an integer program."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ops_registry.checks import check_number

from ..simulation import Product, Recipe, restore, simulate
from ..simulation.coverage import unchanged
from ..simulation.layers import Kind, kind_of, lacks_form
from .candidates import candidate
from .measure import named_modules
from .results import Layer, LeftOut, Report, Score

WEIGHTS, ACTIVATIONS = ("weight", "forward.w"), ("forward.x",)
Loss = Callable[[nn.Module, Any], torch.Tensor]


@dataclass
class Assignment:
    """What :func:`assign` chose.

    choices: the candidate of each operand, by layer: one for all weights of it, and for all layers of one tensor of a
    checkpoint. bits: the average of an element, of weights and where asked of activations. predicted: the loss by the
    report's sensitivities, None without data. loss: the loss of the model with these recipes, where verified. gap: how
    far the choice may be from the best one, as a share, to 2e-6. left_out: what stays in high precision, and why: what
    the report left out, layers with a cost that is not finite, and of a model that was given all other layers with
    products.
    """

    choices: dict[str, dict[str, str]]
    bits: dict[str, float]
    predicted: float | None
    gap: float
    left_out: list[LeftOut] = field(default_factory=list)
    loss: float | None = None

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The mapping that :func:`altgrad.simulation.simulate` takes: layers by name; gradients in high precision."""
        return {name: _recipe(choice) for name, choice in self.choices.items()}

    def to_json(self) -> str:
        """:attr:`recipes` as JSON: ``simulate(model, json.loads(text))``."""
        return json.dumps({name: json.loads(recipe.to_json()) for name, recipe in self.recipes.items()}, indent=1)


def assign(
    report: Report,
    budget_bits: float = 4.5,
    *,
    activations: bool = False,
    model: nn.Module | None = None,
    verify: bool = False,
    batches: Iterable[Any] = (),
    loss: Loss | None = None,
) -> Assignment:
    """Chooses a candidate for the weight of each layer, so that the sum of predicted losses is least within a budget.

    What a choice costs is its sensitivity where the report was measured on data, else its noise-to-signal ratio: every
    layer's relative error counts alike then. The choice is an integer program that scipy's ``milp`` solves.

    Args:
        report: of :func:`report_weights` or :func:`measure`.
        budget_bits: the average bits of storage of a weight, shares of the scales included.
        activations: choose for the layers' inputs too, within the same budget for their elements.
        model: the layers of it that :func:`altgrad.simulation.simulate` can switch take part, no others (embeddings).
        verify: run the model, not compiled, with the choice over the batches, and say what the loss became. Nothing is
            left changed, and random numbers are those that :func:`measure` would draw.
        batches, loss: as in :func:`measure`, to verify.

    Raises:
        TypeError: a report, budget or model of another type.
        ValueError: a budget of NaN, of 0 or less or out of reach, a report without layers that can be chosen for or
            without activations, verify without a model or a loss; a report of a checkpoint, with scales of rows or
            blocks, for a model with weights [in, out] (transformers' Conv1D).

    Example:
        >>> import tempfile, torch
        >>> from altgrad.report import assign, report_weights
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(model.state_dict(), f"{folder}/model.pt")
        ...     report = report_weights(f"{folder}/model.pt", ["E2M1@row", "E5M2@row"])
        >>> assign(report, 5.0, model=model).choices
        {'0': {'weight': 'E2M1@row'}, '1': {'weight': 'E5M2@row'}}
    """
    _check(report, budget_bits, model)
    if verify and (model is None or loss is None):
        raise ValueError("verify needs model, batches and loss")
    kinds = None if model is None else _kinds(model)
    _check_layouts(report, kinds or {})
    choices: dict[str, dict[str, str]] = {}
    bits, gap, added = {}, 0.0, 0.0
    left_out = [*report.left_out, *([] if model is None else _unreported(model, report))]
    for kind, operands in (("weights", WEIGHTS), ("activations", ACTIVATIONS))[: 1 + activations]:
        groups, others = _choosable(report, operands, kinds)
        left_out += others
        if not groups:
            raise ValueError(f"the report of {report.source} has no {kind} to choose for")
        chosen, kind_gap = _solve([group.layers for group in groups], budget_bits, kind)
        gap = max(gap, kind_gap)
        for group, name in zip(groups, chosen):
            for module in group.modules:
                choices.setdefault(module, {})[group.layers[0].operand] = name
        scores = [(layer.count, layer.scores[name]) for group, name in zip(groups, chosen) for layer in group.layers]
        added += sum(score.sensitivity or 0.0 for _, score in scores)
        bits[kind] = sum(n * score.bits for n, score in scores) / sum(n for n, _ in scores)
    predicted = None if report.loss is None else report.loss + report.samples / 2 * added
    assignment = Assignment(choices, bits, predicted, gap, left_out)
    if verify:
        assert model is not None and loss is not None
        assignment.loss = simulated_loss(model, assignment.recipes, batches, loss)
    return assignment


def _check(report: Report, budget_bits: float, model: nn.Module | None) -> None:
    if not isinstance(report, Report):
        raise TypeError(f"report must be a Report, got {report!r}")
    check_number("budget_bits", budget_bits)
    if not budget_bits > 0:  # NaN neither
        raise ValueError(f"budget_bits must be above 0, got {budget_bits!r}")
    if not (model is None or isinstance(model, nn.Module)):
        raise TypeError(f"model must be a torch.nn.Module or None, got {model!r}")


def _kinds(model: nn.Module) -> dict[str, Kind]:
    """The layers that can be simulated, by the names that they have before the model is compiled."""
    kinds = ((name, kind_of(type(layer))) for name, layer in named_modules(model))
    return {name: kind for name, kind in kinds if kind is not None}


def _unreported(model: nn.Module, report: Report) -> list[LeftOut]:
    """Layers with products of which the report has nothing."""
    known = {module for layer in report.layers for module in layer.modules.values()}
    known |= {entry.name for entry in report.left_out}
    kinds, nothing, without = _kinds(model), "the report has nothing of it", "no simulated form"
    found = [name for name, layer in named_modules(model) if name in kinds or lacks_form(layer)]
    return [LeftOut(name, nothing if name in kinds else without) for name in found if name not in known]


def _check_layouts(report: Report, kinds: Mapping[str, Kind]) -> None:
    """A tensor of a checkpoint is seen as [out, in]; where it is [in, out] one scale of all of it is the same."""
    turning = {name for name, kind in kinds.items() if kind.layout == "KN"}
    weights = [layer for layer in report.layers if layer.operand == "weight"]
    turned = [layer.name for layer in weights if not turning.isdisjoint(layer.modules.values())]
    if turned and any(candidate(name).rule.per != "tensor" for name in report.candidates):
        raise ValueError(
            f"report must be of measure for this model, got one of the checkpoint {report.source}: products contract "
            f"the first dimension of these weights, and scales were found along the last: {', '.join(turned)}"
        )


def simulated_loss(model: nn.Module, recipes: Mapping[str, Recipe], batches: Iterable[Any], loss: Loss) -> float:
    """The mean loss over the batches with simulated products; the model and random generators are restored."""
    simulate(model, recipes)
    try:
        with unchanged(model), torch.no_grad():
            losses = [float(loss(model, batch)) for batch in batches]
    finally:
        restore(model)
    if not losses:
        raise ValueError("batches must not be empty")
    return sum(losses) / len(losses)


def cost(layer: Layer, score: Score) -> float:
    """What a score adds to the loss, in units that layers of one report share."""
    if score.sensitivity is not None:
        return score.sensitivity
    if layer.zeros == layer.count:
        return 0.0
    return math.inf if score.sqnr < -3000 else 10 ** (-score.sqnr / 10)  # beyond float64


@dataclass(eq=False)
class _Group:
    """Layers of a model that get one recipe, by name, and what the report has of them."""

    modules: list[str]
    layers: list[Layer]


def _choosable(
    report: Report, operands: tuple[str, ...], names: Collection[str] | None
) -> tuple[list[_Group], list[LeftOut]]:
    """What is chosen for: one recipe serves all that is of a module and all modules that a tensor is of, or nothing."""
    groups: dict[str, _Group] = {}
    left_out, choosable = [], []
    for layer in report.layers:
        if layer.operand not in operands:
            continue
        if not layer.is_matrix:
            left_out += [LeftOut(name, "a vector") for name in layer.modules]
            continue
        modules = {name: module for name, module in layer.modules.items() if names is None or module in names}
        without = "of no layer that can be simulated"
        left_out += [LeftOut(name, without) for name in layer.modules if name not in modules]
        group = _Group(list(modules.values()), [layer])
        for other in dict.fromkeys(groups[module] for module in group.modules if module in groups):
            group = _Group([*other.modules, *group.modules], [*other.layers, *group.layers])
        groups |= dict.fromkeys(group.modules, group)
    for group in dict.fromkeys(groups.values()):
        reasons = [_reason(layer) for layer in group.layers]
        if not any(reasons):
            choosable.append(group)
            continue
        beside = "one recipe would serve it and a tensor that is left out"
        for layer, reason in zip(group.layers, reasons):
            ours = [name for name, module in layer.modules.items() if module in group.modules]
            left_out += [LeftOut(name, reason or beside) for name in ours]
    return choosable, left_out


def _reason(layer: Layer) -> str | None:
    """Why nothing is chosen for a matrix."""
    if layer.nan or layer.infinite:
        return f"{layer.nan} NaN and {layer.infinite} infinities in it"
    costs = {name: cost(layer, score) for name, score in layer.scores.items()}
    return next((f"its cost under {name} is {c}" for name, c in costs.items() if not math.isfinite(c)), None)


def _solve(groups: list[list[Layer]], budget_bits: float, kind: str) -> tuple[list[str], float]:
    """The best candidate of each group, and the gap: x[group, candidate] in {0, 1}, one of each group, within bits."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    names = list(groups[0][0].scores)
    n, m, total = len(groups), len(names), sum(layer.count for layers in groups for layer in layers)

    def table(of: Callable[[Layer, Score], float]) -> Any:
        return np.array([[sum(of(layer, layer.scores[name]) for layer in g) for name in names] for g in groups])

    costs, shares = table(cost), table(lambda layer, score: layer.count / total * score.bits)
    least = shares.min(1).sum()
    if least > budget_bits * (1 + 1e-12):  # both are sums that may have been rounded
        raise ValueError(
            f"budget_bits {budget_bits} is out of reach: the smallest candidates take {least:.4g} bits for {kind}"
        )
    one_of_each = csr_array((np.ones(n * m), (np.repeat(np.arange(n), m), np.arange(n * m))))
    constraints = [
        LinearConstraint(one_of_each, 1, 1),
        LinearConstraint(shares.reshape(1, -1), 0, max(least, budget_bits)),
    ]
    found, unit = costs.max() or 1.0, np.inf
    while 0 < found < unit / 2:  # the solver errs by a millionth of 1, which is to be near the least sum of costs
        unit, allowed = found, costs <= found  # others alone cost more than a choice that is known
        result = milp(
            (np.where(allowed, costs, 0.0) / unit).ravel(),
            integrality=np.ones(n * m),
            bounds=Bounds(0, allowed.ravel()),
            constraints=constraints,
            options={"mip_rel_gap": 1e-6, "time_limit": 60},
        )
        if result.x is None:
            raise ValueError(f"no choice of {kind} within {budget_bits} bits was found: {result.message}")
        chosen = result.x.reshape(n, m).argmax(1)
        found = costs[np.arange(n), chosen].sum()
    return [names[i] for i in chosen], float(result.mip_gap)


def _recipe(choice: Mapping[str, str]) -> Recipe:
    names = [next((choice[key] for key in operands if key in choice), None) for operands in (ACTIVATIONS, WEIGHTS)]
    x, w = (None if name is None else candidate(name).rule for name in names)
    return Recipe(" x ".join(filter(None, names)), forward=Product(x, w))
