"""altgrad.report.assign: the best choice, its budget, and the loss of a model that runs with it."""

import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from altgrad.report import Layer, Report, Score, assign, candidate, measure, report_weights
from altgrad.report.assign import cost
from altgrad.simulation import restore, simulate

pytest.importorskip("scipy")


def made_up(layers, candidates, seed, measured, orders=0):
    """Sensitivities are of as many orders of magnitude as told."""
    r, of_orders = random.Random(seed), random.Random(seed)
    return Report(
        "made up",
        candidates,
        [
            Layer(
                f"{i}.weight",
                "weight",
                (count, 1),
                "float32",
                count,
                0,
                0,
                0,
                {},
                {
                    name: Score(r.uniform(5, 40), 0, 0, 0, 0, r.uniform(3, 9), r.random() * scale if measured else None)
                    for name in candidates
                },
            )
            for i, count in enumerate(r.choices([64, 128, 1000], k=layers))
            for scale in [10 ** of_orders.uniform(-orders, 0)]
        ],
        [],
        loss=1.0 if measured else None,
    )


def judge(report, choice):
    """The cost and the bits of a choice of candidates, by layer."""
    scores = [layer.scores[name] for layer, name in zip(report.layers, choice)]
    bits = sum(layer.count * score.bits for layer, score in zip(report.layers, scores))
    return sum(map(cost, report.layers, scores)), bits / sum(layer.count for layer in report.layers)


@pytest.mark.parametrize("measured, orders", [(False, 0), (True, 0), (True, 9)])
@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all(seed, measured, orders):
    """Sensitivities of nine orders of magnitude too: those that are small beside the largest count as well."""
    names = ["E4M3", "E5M2", "MXFP4", "NVFP4"]
    report = made_up(5, names, seed, measured, orders)
    allowed = [judge(report, choice) for choice in itertools.product(names, repeat=5)]
    for budget in (5.5, 6.5):
        best = min(value for value, bits in allowed if bits <= budget)
        got = assign(report, budget)
        value, bits = judge(report, [got.choices[str(i)]["weight"] for i in range(5)])
        assert bits <= budget and got.bits["weights"] == pytest.approx(bits, rel=1e-12)
        assert value == pytest.approx(best, rel=2e-6, abs=0) and got.gap <= 2e-6
        assert got.predicted == (pytest.approx(1 + value / 2) if measured else None)


def test_costs_that_are_small_beside_the_largest_count():
    """Of three layers with these sensitivities to 4 bits, 4^-n of it to n more, the choice was 1.6 of the least."""
    bits = {"E2M1": 4, "E3M2": 6, "E4M3": 8, "FP16": 16}
    layers = [
        Layer(str(i), "weight", (8, 8), "float32", 64, 0, 0, 0, {}, {
            name: Score(20.0, 0, 0, 0, 0, n, sensitivity * 4.0 ** (4 - n)) for name, n in bits.items()
        })
        for i, sensitivity in enumerate([1e-6, 1e-9, 0.1])
    ]  # fmt: skip
    report = Report("made up", list(bits), layers, [], loss=1.0)
    allowed = [judge(report, choice) for choice in itertools.product(bits, repeat=3)]
    choice = assign(report, 12)
    cost_of_choice, _ = judge(report, [choice.choices[name]["weight"] for name in "012"])
    assert cost_of_choice == min(value for value, n in allowed if n <= 12) and choice.gap == 0.0


def test_budget_out_of_reach():
    with pytest.raises(ValueError, match="budget_bits 1 is out of reach: the smallest candidates take"):
        assign(made_up(3, ["E4M3"], 0, False), 1)
    with pytest.raises(ValueError, match="no activations"):
        assign(made_up(3, ["E4M3"], 0, False), 9, activations=True)
    with pytest.raises(ValueError, match="verify needs"):
        assign(made_up(3, ["E4M3"], 0, False), 9, verify=True)


def test_noise_beyond_float64():
    report = made_up(2, ["E4M3", "E5M2"], 0, False)
    first, second = report.layers
    first.scores = {name: score._replace(sqnr=-4000.0) for name, score in first.scores.items()}
    choice = assign(report, 100)
    assert choice.left_out == [(first.name, "its cost under E4M3 is inf")] and list(choice.choices) == [second.module]


def test_arguments_are_checked():
    report = made_up(3, ["E4M3"], 0, False)
    for budget in (float("nan"), 0, -1.0):
        with pytest.raises(ValueError, match=f"budget_bits must be above 0, got {budget}"):
            assign(report, budget)
    with pytest.raises(TypeError, match="budget_bits must be a number, got 'x'"):
        assign(report, "x")
    with pytest.raises(TypeError, match="report must be a Report, got None"):
        assign(None)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or None, got 'x'"):
        assign(report, 9, model="x")
    assert assign(report, float("inf")).bits == assign(report, 9).bits


def test_recipes_run_and_say_the_loss(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(10, 64), torch.nn.Linear(64, 32), torch.nn.LayerNorm(32))
    model.append(torch.nn.Linear(32, 10))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    batch = torch.randint(10, (5, 7))

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())

    report = report_weights(tmp_path / "m.pt")
    choice = assign(report, 5.0, model=model, verify=True, batches=[batch], loss=loss)
    assert set(choice.choices) == {"1", "3"}
    assert {entry.name for entry in choice.left_out} == {"0.weight", "1.bias", "2.weight", "2.bias", "3.bias"}
    before = loss(model, batch).item()
    simulate(model, json.loads(choice.to_json()))
    with torch.no_grad():
        assert loss(model, batch).item() == choice.loss != before
    restore(model)


def test_layers_with_nan_are_left_out(tmp_path):
    torch.save({"a": torch.tensor([[float("nan"), 1.0]]), "b": torch.ones(2, 2)}, tmp_path / "a.pt")
    choice = assign(report_weights(tmp_path / "a.pt", ["E4M3"]), 100)
    assert list(choice.choices) == ["b"]
    assert choice.left_out == [("a", "1 NaN and 0 infinities in it")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_layers_with_a_cost_that_is_not_finite_are_left_out(value):
    report = made_up(3, ["E4M3", "E5M2"], 0, True)
    scores = report.layers[1].scores
    scores["E5M2"] = scores["E5M2"]._replace(sensitivity=value)
    choice = assign(report, 9)
    assert list(choice.choices) == ["0", "2"]
    assert choice.left_out == [("1.weight", f"its cost under E5M2 is {value}")]


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: torch.nn.Linear(32, 8), {""}),
        (lambda: torch.nn.MultiheadAttention(32, 2), {"", "out_proj"}),
        (lambda: torch.nn.MultiheadAttention(32, 2, kdim=32, vdim=64), {"", "out_proj"}),
        (lambda: torch.nn.ModuleDict({"a": torch.nn.MultiheadAttention(32, 2, vdim=64)}), {"a", "a.out_proj"}),
    ],
    ids=["linear", "attention", "kdim", "inside"],
)
def test_names_of_a_checkpoint_are_those_of_the_model(tmp_path, make, names):
    """A model that is one layer, and an attention whose weights are three: one recipe is theirs."""
    model = make()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    report = report_weights(tmp_path / "m.pt", ["E2M1@row", "E4M3@row"])
    for choice in (assign(report, 6), assign(report, 6, model=model)):
        assert set(choice.choices) == names
        weights = [layer for layer in report.layers if layer.is_matrix]
        bits = sum(layer.count * layer.scores[choice.choices[layer.module]["weight"]].bits for layer in weights)
        assert choice.bits["weights"] == bits / sum(layer.count for layer in weights) <= 6
        simulation = simulate(model, json.loads(choice.to_json()))
        assert {name: state.recipe for name, state in simulation.states.items()} == choice.recipes
        restore(model)


def test_layers_with_one_weight_share_their_choice(tmp_path):
    """Which is stored once; an embedding that is tied to a layer stays in high precision."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32, bias=False) for name in ("a", "b", "c", "head")})
    model["b"].weight = model["a"].weight
    model["embedding"] = torch.nn.Embedding(32, 32)
    model["head"].weight = model["embedding"].weight
    tensors = dict(sorted(model.state_dict().items()))  # the embedding before the head
    torch.save(tensors, tmp_path / "m.pt")
    report = report_weights(tmp_path / "m.pt", ["E2M1@row", "E4M3@row"])
    choice = assign(report, 7.0, model=model)
    assert set(choice.choices) == {"a", "b", "c", "head"}
    assert choice.choices["a"] == choice.choices["b"]
    assert choice.left_out == [("embedding.weight", "of no layer that can be simulated")]
    bits = {name: candidate(operands["weight"]).bits(32, 32) for name, operands in choice.choices.items()}
    assert choice.bits["weights"] == pytest.approx((bits["a"] + bits["c"] + bits["head"]) / 3)
    assert set(assign(report, 7.0).choices) == {"a", "b", "c", "head", "embedding"}  # which are its layers is not known
    tensors["a.weight"][0, 0] = float("nan")
    torch.save(tensors, tmp_path / "m.pt")
    choice = assign(report_weights(tmp_path / "m.pt", ["E4M3"]), 9)
    assert choice.left_out == [(f"{name}.weight", "1 NaN and 0 infinities in it") for name in ("a", "b")]


def test_a_compiled_model_has_the_names_of_the_report():
    inside = torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU()), backend="eager")
    model = torch.nn.Sequential(inside, torch.nn.Linear(16, 4))
    report = measure(model, [torch.ones(4, 8)], lambda model, x: model(x).sum(), ["E4M3"])
    for compiled in (model, torch.compile(model, backend="eager")):
        assert set(assign(report, 9, model=compiled).choices) == {"0.0", "1"}


def test_a_checkpoint_of_weights_that_are_in_by_out(tmp_path):
    """Its scales run along the outputs, those of the products along the inputs."""
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.Sequential(torch.nn.Linear(8, 32), Conv1D(64, 32), Conv1D(8, 64))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    report = report_weights(tmp_path / "m.pt", ["E4M3", "E2M1@row"])
    with pytest.raises(ValueError, match=r"report must be of measure for this model, .*: 1.weight, 2.weight$"):
        assign(report, 6, model=model)
    assert set(assign(report, 6).choices) == {"0", "1", "2"}  # which are its layers is not known
    one_scale = report_weights(tmp_path / "m.pt", ["E4M3", "E2M1"])
    measured = measure(model, [torch.ones(4, 8)], lambda model, x: model(x).sum(), ["E4M3", "E2M1@row"])
    for of in (one_scale, measured):
        assert set(assign(of, 7, model=model).choices) == {"0", "1", "2"}


def test_tensors_of_one_layer_share_their_choice(tmp_path):
    """Whatever they are called; with NaN in one of them nothing is chosen for the others either."""
    tensors = {"m": torch.randn(8, 32), "m.weight": torch.randn(8, 32), "n": torch.ones(8, 32)}
    torch.save(tensors, tmp_path / "m.pt")
    choice = assign(report_weights(tmp_path / "m.pt", ["E2M1@row", "E4M3@row"]), 7)
    bits = {name: candidate(operands["weight"]).bits(8, 32) for name, operands in choice.choices.items()}
    assert choice.bits["weights"] == (2 * bits["m"] + bits["n"]) / 3 <= 7
    tensors["m"][0, 0] = float("nan")
    torch.save(tensors, tmp_path / "m.pt")
    choice = assign(report_weights(tmp_path / "m.pt", ["E2M1@row", "E4M3@row"]), 9)
    beside = "one recipe would serve it and a tensor that is left out"
    assert list(choice.choices) == ["n"]
    assert choice.left_out == [("m", "1 NaN and 0 infinities in it"), ("m.weight", beside)]


def test_a_trained_network_is_closer_to_itself_than_with_one_format(monkeypatch):
    """Digits at five bits a weight: the outputs on test data diverge least with what is assigned."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "docs" / "examples")])
    import choose_formats
    import train_digits

    train_x, test_x, train_y, test_y = train_digits.digits()
    generator = torch.Generator().manual_seed(0)

    def batch():
        index = torch.randint(len(train_x), (128,), generator=generator)
        return train_x[index], train_y[index]

    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(64, 10))
    choose_formats.fit(model, batch, 300, 3e-3)
    batches = [batch() for _ in range(4)]
    report = measure(model, batches, choose_formats.loss, choose_formats.CANDIDATES)
    weights = [layer for layer in report.layers if layer.operand == "forward.w"]
    bits = [layer.count * layer.scores["e2m2b1f"].bits for layer in weights]
    choice = assign(report, sum(bits) / sum(layer.count for layer in weights), model=model)
    test = [(test_x, test_y)]
    assigned = choose_formats.divergence(model, choice.recipes, test)
    for name in choose_formats.FIVE_BITS:
        uniform = {layer.name: candidate(name).recipe() for layer in weights}
        assert assigned < choose_formats.divergence(model, uniform, test), name


def test_a_budget_that_is_met_exactly():
    """A sum of rounded shares, 4.25 and a bit, was out of reach."""
    score = {"MXFP4": Score(20.0, 0, 0, 4.0, 1.0, 4.25)}
    counts = {"a": 3, "b": 5, "c": 5}
    layers = [Layer(f"{n}.weight", "weight", (c, 32), "float32", c * 32, 0, 0, 0, {}, score) for n, c in counts.items()]
    choice = assign(Report("x", ["MXFP4"], layers, []), 4.25)
    assert {name: operands["weight"] for name, operands in choice.choices.items()} == dict.fromkeys(counts, "MXFP4")
