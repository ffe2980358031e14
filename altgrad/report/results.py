"""A report as data: layers, what each candidate does to them, and JSON there and back."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Score(NamedTuple):
    """What a candidate does to a tensor.

    sqnr: dB. clipped, flushed: shares of all elements, beyond the largest value and to zero. used_bits: log2 of the
    number of codes in use. scale_spread: log2 of the largest scale over the smallest, NaN where one is NaN. bits: of
    storage an element, its share of the scales included. sensitivity: sum of squared gradient times squared error, None
    without data.
    """

    sqnr: float
    clipped: float
    flushed: float
    used_bits: float
    scale_spread: float
    bits: float
    sensitivity: float | None = None


@dataclass
class Layer:
    """An operand of a layer, or a tensor of a checkpoint, with its scores by candidate.

    octaves: how many values have a magnitude in [2^k, 2^(k + 1)), by k. also: other names of the same memory.
    """

    name: str
    operand: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    zeros: int
    nan: int
    infinite: int
    octaves: dict[int, int]
    scores: dict[str, Score]
    also: list[str] = field(default_factory=list)

    @property
    def is_matrix(self) -> bool:
        """Whether it is an operand of a product; vectors (biases, gains of norms) are not."""
        return len(self.shape) > 1

    @property
    def module(self) -> str:
        """The name of the layer of the model: without that of the weight, which a tensor of a checkpoint has."""
        return self.modules[self.name]

    @property
    def modules(self) -> dict[str, str]:
        """:attr:`module` for each name, those of the same memory too."""
        modules = {}
        for name in (self.name, *self.also):
            module, _, parameter = name.rpartition(".")
            modules[name] = module if self.operand == "weight" and parameter in _WEIGHTS else name
        return modules


class LeftOut(NamedTuple):
    """A tensor or layer without scores, and why."""

    name: str
    reason: str


@dataclass
class Report:
    """What :func:`report_weights` and :func:`measure` found.

    source: of what. candidates: their names. loss: the mean loss over the batches, None without data. samples: how many
    terms a batch's loss is the mean of.
    """

    source: str
    candidates: list[str]
    layers: list[Layer]
    left_out: list[LeftOut]
    loss: float | None = None
    samples: float = 1.0

    def to_json(self) -> str:
        """JSON in which infinity and NaN, which it lacks, are strings."""
        return json.dumps(finite(asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that :meth:`to_json` wrote.

        Raises:
            ValueError: text that is no report.
        """
        try:
            data = json.loads(text)
            data["layers"] = [_layer(layer) for layer in data["layers"]]
            data["left_out"] = [LeftOut(*entry) for entry in data["left_out"]]
            data["loss"] = _number(data.get("loss"))
            return cls(**data)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a report: {error}") from error


def _layer(data: Mapping[str, Any]) -> Layer:
    scores = {name: Score(*map(_number, values)) for name, values in data["scores"].items()}
    octaves = {int(k): count for k, count in data["octaves"].items()}
    return Layer(**{**data, "shape": tuple(data["shape"]), "scores": scores, "octaves": octaves})


def _number(value: Any) -> Any:
    return None if value is None else float(value)


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_files(files: Mapping[Path, str]) -> None:
    """Writes texts to paths, all or none, never a part: to temporary names beside them first, then renamed.

    Raises:
        OSError: a path that cannot be written, or that is there and no regular file (a device would be replaced).
    """
    for path in files:
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}")
    written: list[tuple[str, Path]] = []
    try:
        for path, text in files.items():
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            written.append((temporary, path))
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o666 & ~_umask())
        while written:
            temporary, path = written[0]
            os.replace(temporary, path)
            written.pop(0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        for temporary, _ in written:
            os.unlink(temporary)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
