"""The recipes that were published, by name. Who else to ask is in each one's ``source``.

- ``fp8_current``: E4M3 forward, E5M2 gradients, one scale of each tensor's own amax. TransformerEngine's
  Float8CurrentScaling.
- ``fp8_delayed``: the same formats, scales from the amax of the last 1024 steps. TransformerEngine's DelayedScaling.
- ``fp8_rowwise``: E4M3, a power of two for each row of each of the six operands. torchao's float8 recipe "rowwise".
- ``mxfp8``: E4M3, blocks of 32 along the contraction, scales rounded up to powers of two; six roundings from high
  precision. Mishra et al., arXiv 2506.08027; TransformerEngine's MXFP8BlockScaling.
- ``mxfp6_e2m3``, ``mxfp6_e3m2``, ``mxfp4``: blocks of 32 with the standard's scale rule. OCP Microscaling Formats 1.0;
  Rouhani et al., arXiv 2310.10537.
- ``mx_ocp``: E4M3 as in the microxcaling library: the standard's scale rule, ties away from zero.
- ``fp8_block``: E4M3, x and gradients by 128 along the contraction, weights by 128 x 128, scales rounded up to powers
  of two. DeepSeek-V3, arXiv 2412.19437, section 3.3; TransformerEngine's Float8BlockScaling.
- ``nvfp4``: E2M1 by 16 (weights by 16 x 16) with E4M3 scales under a float32 one; gradients rounded stochastically, a
  Hadamard transform of both operands of the weight's gradient. arXiv 2509.25149; TransformerEngine's NVFP4BlockScaling.
- ``unit_scaled_fp8``: E4M3 with infinities (largest value 240) forward, E5M2 gradients, no scales, stochastic rounding,
  the operands of the forward product again in the backward pass. The unit-scaling library; arXiv 2303.11257.
"""

from dataclasses import replace

from .recipes import Product, Recipe, Rule


def _same(name: str, rule: Rule, source: str) -> Recipe:
    """One rule for all six operands."""
    return Recipe(name, (rule, rule), (rule, rule), (rule, rule), source)  # type: ignore[arg-type]


def _per_tensor(name: str, source: str, history: int = 0) -> Recipe:
    x, dy = Rule("E4M3", history=history), Rule("E5M2", history=history)
    return Recipe(name, Product(x, x), Product(dy, x), Product(dy, x), source)


def _mx(name: str, format: str) -> Recipe:
    return _same(name, Rule(format, per=32, power_of_two="floor"), "OCP MX 1.0, arXiv 2310.10537")


def _fp8_block() -> Recipe:
    row, square = (Rule("E4M3", per=size, power_of_two="rceil") for size in (128, (128, 128)))
    source = "DeepSeek-V3, arXiv 2412.19437, section 3.3; TransformerEngine Float8BlockScaling"
    return Recipe("fp8_block", Product(row, square), Product(row, square), Product(row, row), source)


def _nvfp4() -> Recipe:
    x, w = (Rule("E2M1", per=size, scale_format="E4M3") for size in (16, (16, 16)))
    dy = replace(x, rounding="stochastic")
    source = "arXiv 2509.25149; TransformerEngine NVFP4BlockScaling"
    return Recipe("nvfp4", Product(x, w), Product(dy, w), Product(dy, x, hadamard=16), source)


def _unit_scaled_fp8() -> Recipe:
    x, dy = (Rule(f, scale=1.0, rounding="stochastic", saturation="finite") for f in ("e4m3b7", "E5M2"))
    again = Rule(None, source="forward")
    return Recipe(
        "unit_scaled_fp8", Product(x, x), Product(dy, again), Product(dy, again), "unit-scaling; arXiv 2303.11257"
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _per_tensor("fp8_current", "TransformerEngine Float8CurrentScaling"),
        _per_tensor("fp8_delayed", "TransformerEngine DelayedScaling", history=1024),
        _same("fp8_rowwise", Rule("E4M3", per="row", power_of_two="rceil"), "torchao float8, recipe rowwise"),
        _same(
            "mxfp8",
            Rule("E4M3", per=32, power_of_two="rceil"),
            "arXiv 2506.08027; TransformerEngine MXFP8BlockScaling; torchao",
        ),
        _mx("mxfp6_e2m3", "E2M3"),
        _mx("mxfp6_e3m2", "E3M2"),
        _mx("mxfp4", "E2M1"),
        _same(
            "mx_ocp",
            Rule("E4M3", per=32, power_of_two="floor", rounding="nearest_ties_to_away"),
            "microxcaling, mx/linear.py",
        ),
        _fp8_block(),
        _nvfp4(),
        _unit_scaled_fp8(),
    )
}


def as_recipe(recipe: "Recipe | str | dict[str, object]") -> Recipe:
    """A recipe by its name in RECIPES, from parsed JSON, or itself.

    Raises:
        TypeError, ValueError: what is neither.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
        return RECIPES[recipe]
    if isinstance(recipe, dict):
        return Recipe.from_dict(recipe)
    raise TypeError(f"recipe must be a Recipe, the name of one or its parsed JSON, got {recipe!r}")
