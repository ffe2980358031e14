"""What is quantized how, as data: rules of operands, the three products of a layer, and recipes of them."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar

from ops_registry.accumulators import Accumulator, resolve_accumulator
from ops_registry.modes import POWER_OF_TWO_RULES, ROUNDINGS, SATURATIONS

from ..quantization.formats import FP8Format, resolve
from ..quantization.scaling import METHODS, ScaleOptions, check_options

SOURCES = ("tensor", "forward")
PRODUCTS = ("forward", "grad_input", "grad_weight")


class _Data:
    """A repr that leaves out what has its default, and dictionaries there and back."""

    def __repr__(self) -> str:
        given = [(f, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]
        shown = [
            repr(value) if f.default is MISSING else f"{f.name}={value!r}" for f, value in given if value != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Rule(_Data):
    """How one operand of a product becomes values of a small format times scales.

    The operand is a matrix [rows, contraction], or a stack of them: the product contracts the last dimension.

    Args:
        format: a name (``"E4M3"``), a spelling (``"e3m4b3fn"``) or an :class:`FP8Format`. None: the operand is not
            rounded, which is of use with ``source="forward"``.
        per: who shares a scale: ``"tensor"``, ``"row"``, n for n elements along the contraction, ``(m, n)`` for m rows
            times n elements. Blocks start at index 0, the last ones may be smaller.
        method, fraction, power_of_two, scale_format: as in :func:`altgrad.quantization.compute_scale`.
        scale: a fixed scale instead of a computed one.
        headroom: the statistic is multiplied by it: 2^margin in delayed scaling; 17/16 makes stochastic rounding
            unbiased where a scale is rounded to E4M3, down by at most 1/17.
        rounding, saturation: as in :func:`altgrad.quantization.quantize`; ``"stochastic"`` draws bits from a counter.
        history: delayed scaling: the scale comes from the largest amax of so many steps before this one. 0: from the
            operand itself.
        source: ``"tensor"``: the operand in high precision. ``"forward"``: the operand of the forward product, which
            is rounded a second time.

    Raises:
        TypeError, ValueError: an unknown format, granularity, method, rule or rounding, or options that exclude each
            other.

    Example:
        >>> from altgrad.simulation import Rule
        >>> Rule("e4m3", per=32, power_of_two="rceil")
        Rule('E4M3', per=32, power_of_two='rceil')
    """

    format: str | None
    per: str | int | tuple[int, int] = "tensor"
    method: str = "amax"
    fraction: float = 0.999
    power_of_two: str | None = None
    scale_format: str | None = None
    scale: float | None = None
    headroom: float = 1.0
    rounding: str = ROUNDINGS[0]
    saturation: str = SATURATIONS[0]
    history: int = 0
    source: str = SOURCES[0]

    def __post_init__(self) -> None:
        for name in ("format", "scale_format"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, resolve(value).name)
        if isinstance(self.per, list):  # JSON has no tuples
            object.__setattr__(self, "per", tuple(self.per))
        sizes = self.per if isinstance(self.per, tuple) else (self.per, self.per)
        is_block = len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
        if self.per not in ("tensor", "row") and not is_block:
            raise ValueError(f"per must be 'tensor', 'row', n or (m, n), got {self.per!r}")
        for name, choices in (
            ("method", METHODS),
            ("power_of_two", (None, *POWER_OF_TWO_RULES)),
            ("rounding", ROUNDINGS),
            ("saturation", SATURATIONS),
            ("source", SOURCES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        for name in ("fraction", "scale", "headroom"):
            value = getattr(self, name)
            if not isinstance(value, Real) and not (name == "scale" and value is None):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be from 0 to 1, got {self.fraction!r}")
        for name in ("scale", "headroom"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        if type(self.history) is not int or self.history < 0:
            raise ValueError(f"history must be an integer of at least 0, got {self.history!r}")
        self._check_together()

    def _check_together(self) -> None:
        if self.format is not None:
            check_options(
                resolve(self.format),
                ScaleOptions(
                    method=self.method, headroom=self.headroom, power_of_two=self.power_of_two,
                    scale_format=self.scale_format,
                ),
            )  # fmt: skip
        if (self.history or self.scale) and self.per != "tensor":
            raise ValueError(f"a fixed or delayed scale is one of the tensor, got per={self.per!r}")
        rounded = self.power_of_two is not None or self.scale_format is not None
        if sum((bool(self.history), self.scale is not None, rounded)) > 1:
            raise ValueError("scale, history and a rounded scale exclude each other: give one of them")
        if (self.history or self.scale is not None) and self.method != METHODS[0]:
            raise ValueError(f"a fixed or delayed scale has no other method than {METHODS[0]!r}, got {self.method!r}")
        if self.headroom != 1 and self.scale is not None:
            raise ValueError("headroom is for a scale of amax or of a percentile, not for a fixed one")

    @property
    def block(self) -> tuple[int, int]:
        """The rows and the elements along the contraction of a block."""
        assert not isinstance(self.per, str)
        return self.per if isinstance(self.per, tuple) else (1, self.per)

    @property
    def is_stochastic(self) -> bool:
        return self.format is not None and self.rounding == "stochastic"

    def has_outer_scale(self, accumulator: str | None) -> bool:
        """Whether a scale is left out of the operand, to be multiplied to the product."""
        if self.format is None:
            return False
        if self.scale is not None:
            return self.scale != 1
        constant = self.per in ("tensor", "row") and (self.power_of_two is None or accumulator is not None)
        return constant or self.scale_format is not None

    def suits(self, accumulator: Accumulator) -> bool:
        """Whether its scales are those that the accumulator takes."""
        if accumulator.scaled is None or isinstance(self.per, str):
            return accumulator.scaled is None and isinstance(self.per, str)
        if accumulator.sums_block:
            has_scales = self.scale_format is not None and resolve(self.scale_format) == resolve("E4M3")
        else:
            has_scales = self.power_of_two is not None
        return has_scales and self.block[1] == accumulator.scaled

    @property
    def serves_both_directions(self) -> bool:
        """Whether the transposed operand is the operand transposed, bit for bit, so that one rounding is enough."""
        is_square = isinstance(self.per, tuple) and self.per[0] == self.per[1]
        return self.format is not None and not self.is_stochastic and (self.per == "tensor" or is_square)


@dataclass(frozen=True, repr=False)
class Product(_Data):
    """The rules of the two operands of a product, None for high precision.

    Args:
        left: of the operand that gives the rows: x in the forward product, the incoming gradient in the others.
        right: of the operand that gives the columns: the weight, and x in the product that gives its gradient.
        hadamard: 16: both operands pass through a Hadamard transform of 16 elements along the contraction first, with
            the fixed signs of TransformerEngine's NVFP4. 0: none.

    Example:
        >>> from altgrad.simulation import Product, Rule
        >>> Product(Rule("E5M2"), None)
        Product(Rule('E5M2'), None)
    """

    left: Rule | None
    right: Rule | None
    hadamard: int = 0

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if not isinstance(getattr(self, name), Rule | None):
                raise TypeError(f"{name} must be a Rule or None, got {getattr(self, name)!r}")
        if self.hadamard not in (0, 16):
            raise ValueError(f"hadamard must be 0 or 16, got {self.hadamard!r}")

    @property
    def is_simulated(self) -> bool:
        return self.left is not None or self.right is not None


@dataclass(frozen=True, repr=False)
class Recipe(_Data):
    """The three products of a layer, ``y = x w^T``, ``dx = dy w``, ``dw = dy^T x``: which operand is rounded how.

    Args:
        name: what tables call it.
        forward, grad_input, grad_weight: a :class:`Product`, or a pair of rules (left, right). High precision where
            nothing is given.
        source: who published it.
        accumulator: of all three products or a triple, one for each: the name or the spelling of one of
            :mod:`altgrad.accumulators`, for operands of the rules' formats. None: float32, by torch.

    Raises:
        TypeError, ValueError: what is no product, a forward product that has the forward product as its source, an
            unknown accumulator or one that the rules' scales do not suit.

    Example:
        >>> from altgrad.simulation import Recipe, Rule
        >>> rule = Rule("e3m2b3f", per=64, power_of_two="floor")
        >>> recipe = Recipe("mine", forward=(rule, rule), grad_input=(rule, rule), grad_weight=(rule, rule))
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
        >>> from dataclasses import replace
        >>> from altgrad.simulation import RECIPES
        >>> hopper = replace(RECIPES["fp8_current"], accumulator=("HOPPER_FP8_FAST", "HOPPER_FP8", "HOPPER_FP8"))
    """

    name: str
    forward: Product = Product(None, None)
    grad_input: Product = Product(None, None)
    grad_weight: Product = Product(None, None)
    source: str = ""
    accumulator: str | tuple[str | None, str | None, str | None] | None = None
    # Of forward, grad_input and grad_weight, for operands of the formats of their rules.
    accumulators: ClassVar[tuple[str | None, ...]] = (None, None, None)

    def __post_init__(self) -> None:
        for name in PRODUCTS:
            product = getattr(self, name)
            if isinstance(product, tuple):
                object.__setattr__(self, name, Product(*product))
            elif not isinstance(product, Product):
                raise TypeError(f"{name} must be a Product or a pair of rules, got {product!r}")
        if any(rule is not None and rule.source == "forward" for rule in (self.forward.left, self.forward.right)):
            raise ValueError("a rule of the forward product cannot have source='forward'")
        if self.forward.hadamard and any(rule is not None and rule.source == "forward" for rule in self.rules):
            raise ValueError("source='forward' is not defined behind a Hadamard transform of the forward product")
        if isinstance(self.accumulator, list):  # JSON has no tuples
            object.__setattr__(self, "accumulator", tuple(self.accumulator))
        one = self.accumulator
        three = one if isinstance(one, tuple) else (one, one, one)
        if len(three) != 3:
            raise ValueError(f"accumulator must be one or three, of {', '.join(PRODUCTS)}, got {one!r}")
        # Resolved now: torch.compile cannot trace it.
        object.__setattr__(self, "accumulators", tuple(map(self._accumulator_of, three, self.products)))

    def _accumulator_of(self, name: str | None, product: Product) -> str | None:
        """The accumulator of a product, with the formats of the operands where rules give one."""
        if name is None:
            return None
        accumulator = resolve_accumulator(name)
        formats: list[FP8Format | str | None] = []
        of_forward = {id(self.grad_input): self.forward.right, id(self.grad_weight): self.forward.left}
        for rule, own in zip((product.left, product.right), accumulator.formats, strict=True):
            if rule is not None and rule.source == "forward":
                again = of_forward[id(product)]
                if accumulator.scaled or again is None or again.per != "tensor":
                    raise ValueError(f"source='forward' needs scales per tensor with accumulator {name!r}")
                rule = again if rule.format is None else rule
            if rule is None or rule.format is None:
                formats.append(own)
            elif rule.suits(accumulator):
                formats.append(rule.format)
            elif accumulator.scaled is None:
                raise ValueError(
                    f"accumulator {name!r} needs scales that are constant along the contraction, per='tensor' or "
                    f"'row', got {rule!r}"
                )
            else:
                scales = "scale_format='E4M3'" if accumulator.sums_block else "scales of powers of two"
                raise ValueError(
                    f"accumulator {name!r} needs blocks of {accumulator.scaled} along the contraction with {scales}, "
                    f"got {rule!r}"
                )
        return accumulator.with_formats(*formats).name

    @property
    def products(self) -> tuple[Product, Product, Product]:
        return self.forward, self.grad_input, self.grad_weight

    @property
    def rules(self) -> tuple[Rule | None, ...]:
        """The six rules: left and right of forward, of grad_input and of grad_weight. State is numbered like them."""
        return tuple(rule for product in self.products for rule in (product.left, product.right))

    @property
    def is_stochastic(self) -> bool:
        return any(rule is not None and rule.is_stochastic for rule in self.rules)

    @property
    def history(self) -> int:
        """The length of the longest amax history, 0 without delayed scaling."""
        return max(0 if rule is None else rule.history for rule in self.rules)

    def forward_only(self) -> "Recipe":
        """The recipe for inference: gradients in high precision, from operands in high precision."""
        high = Product(None, None)
        accumulator = (self.accumulators[0], None, None) if self.accumulators[0] else None
        name = f"{self.name}, forward only"
        return replace(self, name=name, grad_input=high, grad_weight=high, accumulator=accumulator)

    def to_json(self) -> str:
        """The recipe as JSON, in which what has its default is left out."""
        return json.dumps(_without_defaults(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The recipe that :meth:`to_json` wrote.

        Raises:
            ValueError: unknown keys, or what the classes refuse.
        """
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """The recipe of parsed JSON."""
        data, products = _checked(cls, data), {}
        for name in PRODUCTS:
            if name in data:
                product = _checked(Product, data[name])
                sides = {side: product.get(side) for side in ("left", "right")}
                rules = {side: rule if rule is None else Rule(**_checked(Rule, rule)) for side, rule in sides.items()}
                products[name] = Product(**{**product, **rules})
        return cls(**{**data, **products})


def _checked(cls: type, data: Any) -> dict[str, Any]:
    names = [f.name for f in fields(cls)]
    if not isinstance(data, Mapping):
        raise ValueError(f"a {cls.__name__} must be a dictionary of {', '.join(names)}, got {data!r}")
    unknown = [str(name) for name in data if name not in names]
    if unknown:
        raise ValueError(f"{cls.__name__} has {', '.join(names)}, got {', '.join(unknown)}")
    if names[0] not in data and cls is not Product:  # what has no default
        raise ValueError(f"a {cls.__name__} needs a {names[0]}, got {', '.join(data) or 'nothing'}")
    return dict(data)


def _without_defaults(value: Any) -> Any:
    if not isinstance(value, _Data):
        return value
    return {
        f.name: _without_defaults(getattr(value, f.name))
        for f in fields(value)  # type: ignore[arg-type]
        if getattr(value, f.name) != f.default
    }
