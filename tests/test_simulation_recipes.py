"""Recipes are data: frozen, comparable, printable, JSON there and back, and what they refuse."""

import dataclasses
import json
import pickle

import pytest

from altgrad.quantization import E4M3
from altgrad.simulation import RECIPES, Product, Recipe, Rule

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=str)


@recipes
def test_there_and_back(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe == eval(repr(recipe))
    assert hash(Recipe.from_json(recipe.to_json())) == hash(recipe)
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"


@recipes
def test_published_recipes_say_where(recipe):
    assert recipe.source and RECIPES[recipe.name] is recipe
    assert all(rule is not None for rule in recipe.rules)


def test_names():
    assert list(RECIPES) == [
        "fp8_current",
        "fp8_delayed",
        "fp8_rowwise",
        "mxfp8",
        "mxfp6_e2m3",
        "mxfp6_e3m2",
        "mxfp4",
        "mx_ocp",
        "fp8_block",
        "nvfp4",
        "unit_scaled_fp8",
    ]


def test_what_follows_from_rules():
    nvfp4, delayed = RECIPES["nvfp4"], RECIPES["fp8_delayed"]
    assert (nvfp4.is_stochastic, nvfp4.history) == (True, 0)
    assert (delayed.is_stochastic, delayed.history) == (False, 1024)
    assert nvfp4.forward_only().rules == (*nvfp4.rules[:2], None, None, None, None)
    assert not nvfp4.forward_only().is_stochastic
    assert [rule.serves_both_directions for rule in nvfp4.rules] == [False, True, False, True, False, False]
    assert all(rule.serves_both_directions for rule in RECIPES["fp8_current"].rules)
    assert not any(rule.serves_both_directions for rule in RECIPES["mxfp8"].rules)


def test_formats_in_any_form():
    assert Rule(E4M3) == Rule("e4m3") == Rule("E4M3")
    assert Recipe.from_json('{"name": "a", "forward": {"left": {"format": "E4M3", "per": [16, 16]}}}') == Recipe(
        "a", (Rule(E4M3, per=(16, 16)), None)
    )


def test_json_leaves_out_defaults():
    assert json.loads(Recipe("a", (Rule("E4M3"), None)).to_json()) == {
        "name": "a",
        "forward": {"left": {"format": "E4M3"}, "right": None},
    }


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Rule("E9M9"), ValueError, "E9M9"),
        (lambda: Rule(4), TypeError, "format"),
        *(
            (lambda per=per: Rule("E4M3", per=per), ValueError, "per must be 'tensor', 'row', n or")
            for per in ("col", 0, (1,), (2, -2), 1.5, (1, 2, 3), True, None)
        ),
        (
            lambda: Rule("E4M3", method="max"),
            ValueError,
            "method must be one of amax, percentile, mse, four_over_six, got 'max'",
        ),
        (lambda: Rule("E4M3", power_of_two="up"), ValueError, "power_of_two must be one of None, floor"),
        (lambda: Rule("E4M3", rounding="up"), ValueError, "rounding must be one of .*stochastic, got 'up'"),
        (lambda: Rule("E4M3", saturation="up"), ValueError, "saturation must be one of"),
        (lambda: Rule("E4M3", source="x"), ValueError, "source must be one of tensor, forward"),
        (lambda: Rule("E4M3", fraction=2), ValueError, "fraction must be from 0 to 1"),
        (lambda: Rule("E4M3", scale=0.0), ValueError, "scale must be positive and finite"),
        (lambda: Rule("E4M3", headroom=float("inf")), ValueError, "headroom must be positive and finite"),
        (lambda: Rule("E4M3", history=-1), ValueError, "history must be"),
        (lambda: Rule("E4M3", power_of_two="floor", scale_format="E4M3"), ValueError, "both round the scale"),
        (lambda: Rule("E4M3", per=32, history=2), ValueError, "one of the tensor, got per=32"),
        (lambda: Rule("E4M3", scale=1.0, history=2), ValueError, "exclude each other"),
        (lambda: Rule("E4M3", method="mse", headroom=2.0), ValueError, "headroom is for"),
        (lambda: Rule("E4M3", history=4, method="percentile"), ValueError, "no other method than 'amax'"),
        (lambda: Rule("E4M3", scale=2.0, method="mse"), ValueError, "no other method than 'amax', got 'mse'"),
        (lambda: Rule("E4M3", fraction="a"), TypeError, "fraction must be a number, got 'a'"),
        (lambda: Rule("E4M3", scale="1"), TypeError, "scale must be a number, got '1'"),
        (lambda: Rule("E4M3", headroom=None), TypeError, "headroom must be a number, got None"),
        (lambda: Product("E4M3", None), TypeError, "left must be a Rule or None, got 'E4M3'"),
        (lambda: Product(None, None, hadamard=8), ValueError, "hadamard must be 0 or 16, got 8"),
        (lambda: Recipe("a", None), TypeError, "forward must be a Product or a pair of rules"),
        (lambda: Recipe("a", (Rule(None, source="forward"), None)), ValueError, "cannot have source='forward'"),
        (
            lambda: Recipe("a", Product(None, None, 16), (None, Rule(None, source="forward"))),
            ValueError,
            "behind a Hadamard transform",
        ),
        (lambda: Recipe.from_json("[]"), ValueError, r"a Recipe must be a dictionary of name, .*, got \[\]"),
        (lambda: Recipe.from_json("{}"), ValueError, "a Recipe needs a name, got nothing"),
        (lambda: Recipe.from_json('{"name": "a", "forward": 3}'), ValueError, "a Product must be a dictionary"),
        (
            lambda: Recipe.from_json('{"name": "a", "forward": {"left": "E4M3", "right": null}}'),
            ValueError,
            "a Rule must be a dictionary of format, .*, got 'E4M3'",
        ),
        (lambda: Recipe.from_json('{"name": "a", "backward": 1}'), ValueError, "Recipe has .*, got backward"),
        (
            lambda: Recipe.from_json('{"name": "a", "forward": {"left": {"format": "E4M3", "block": 2}}}'),
            ValueError,
            "Rule has .*, got block",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
