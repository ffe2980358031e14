"""The report of a checkpoint: every weight under every candidate, on all cores."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from ops_registry.checks import FLOAT_DTYPES

from .candidates import DEFAULT, Candidate, candidates_of
from .checkpoint import Checkpoint, Entry
from .results import Layer, LeftOut, Report
from .tally import (
    PART,
    ScaleFunction,
    Signal,
    Tally,
    add,
    empty_tally,
    largest_of,
    matrix,
    one_scale,
    parts,
    patterns,
    scale_function,
    value_counts,
)

# Elements from which on it is quicker to look at each different value once, under one scale or under few.
_BY_VALUE, _BY_SCALE_AND_VALUE = 1 << 17, 1 << 20
_FLOATS = [str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES]


def report_weights(
    path: str | Path, candidates: Iterable[str] = DEFAULT, progress: Callable[[int, int], None] | None = None
) -> Report:
    """What each candidate does to each tensor of a checkpoint.

    For a tensor w seen as the matrix ``w.flatten(1)`` and the scale that :func:`altgrad.quantization.compute_scale`
    finds for the candidate, the scores are those of :func:`altgrad.quantization.quantization_stats`. Tensors are read
    one at a time. Integer, empty, sparse, nested and meta tensors, and states of optimizers, are listed as left out.
    Which weights are [in, out] (those of transformers' Conv1D) a checkpoint does not say: their rows are not those of
    the product.

    Args:
        path: see :class:`Checkpoint`.
        candidates: names or spellings, see :func:`candidate`.
        progress: called with the elements done and those of all tensors.

    Raises:
        TypeError: candidates is not a list of strings.
        ValueError: an unknown candidate; no such file, a truncated or foreign one, one without tensors.

    Example:
        >>> import tempfile, torch
        >>> from altgrad.report import report_weights
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"w": torch.tensor([[1.0, 500.0], [0.1, -2.0]])}, f"{folder}/w.pt")
        ...     report = report_weights(f"{folder}/w.pt", ["E0M7", "E5M2"])
        >>> [score.flushed for score in report.layers[0].scores.values()]
        [0.5, 0.0]
    """
    chosen = candidates_of(candidates)
    checkpoint = Checkpoint(path)
    layers, left_out = [], []
    done, total = 0, sum(entry.count for entry in checkpoint.entries)
    with _workers() as pool:
        for entry in checkpoint.entries:
            reason = _reason(entry)
            if reason is None:
                layers.append(_layer(entry, checkpoint.read(entry), chosen, pool))
            else:
                left_out.append(LeftOut(entry.name, reason))
            done += entry.count
            if progress is not None:
                progress(done, total)
    if not layers:
        raise ValueError(f"{path}: no floating-point tensors in it, {len(left_out)} others")
    return Report(str(path), [c.name for c in chosen], layers, left_out)


def _reason(entry: Entry) -> str | None:
    """Why a tensor is left out."""
    if entry.dtype not in _FLOATS:
        return f"{entry.dtype}: not one of {', '.join(_FLOATS)}"
    return "empty" if entry.count == 0 else None


def _layer(entry: Entry, x: Tensor, chosen: list[Candidate], pool: ThreadPoolExecutor) -> Layer:
    x = matrix(x)
    largest = largest_of(x)
    by_value = [c for c in chosen if _goes_by_value(c, x, largest)]
    by_part = [c for c in chosen if c not in by_value]
    if by_value:
        signal, counted = _count_values(x, largest, by_value, pool)
    else:
        signal, counted = reduce(operator.add, pool.map(_signal, parts(x, chosen))), {}
    if by_part:
        functions = [scale_function(largest, c) for c in by_part]
        found = pool.map(partial(_count, chosen=by_part, functions=functions), parts(x, by_part))
        counted |= {c.name: reduce(operator.add, tallies) for c, tallies in zip(by_part, zip(*found))}
    return Layer(
        entry.name,
        "weight",
        entry.shape,
        entry.dtype,
        signal.count,
        signal.zeros,
        signal.nan,
        signal.infinite,
        signal.octaves(),
        {c.name: counted[c.name].score(signal, c.bits(*x.shape)) for c in chosen},
        entry.also,
    )


def _goes_by_value(c: Candidate, x: Tensor, largest: Tensor) -> bool:
    """Whether few scales serve all of x, and x has more values than there are different ones under each of them."""
    if x.dtype.itemsize != 2:
        return False
    if c.rule.per == "tensor":
        return x.numel() > _BY_VALUE
    return c.rule.power_of_two == "floor" and x.numel() > _BY_SCALE_AND_VALUE and bool(largest.isfinite())


def _count_values(
    x: Tensor, largest: Tensor, chosen: list[Candidate], pool: ThreadPoolExecutor
) -> tuple[Signal, dict[str, Tally]]:
    """Looks at each different value under each scale once, and at how often it is there."""
    counted: dict[str, Tally] = {}
    for granularity in dict.fromkeys(c.granularity for c in chosen):
        alike = [c for c in chosen if c.granularity == granularity]
        found = pool.map(partial(value_counts, granularity=granularity), parts(x, alike, 16 * PART))
        groups = reduce(_merged, found)
        largest_ones = [largest if math.isnan(amax) else largest.new_full((), amax) for amax in groups]
        signals, of_groups = zip(*pool.map(partial(_count_group, x.dtype, alike), largest_ones, groups.values()))
        counted |= {c.name: reduce(operator.add, tallies) for c, tallies in zip(alike, zip(*of_groups))}
    return reduce(operator.add, signals), counted


def _count_group(
    dtype: torch.dtype, chosen: list[Candidate], largest: Tensor, counts: Tensor
) -> tuple[Signal, list[Tally]]:
    """Counts the values that are there, all under the scale that a group with this largest magnitude has."""
    present = counts > 0
    values, counts = patterns(dtype)[:, present], counts[present].unsqueeze(0)
    signal, tallies = Signal(), [empty_tally(c) for c in chosen]
    signal.add(values, counts)
    for tally, c in zip(tallies, chosen):
        add(tally, values, values.double(), c, one_scale(largest, c), counts=counts)
    return signal, tallies


def _merged(a: dict[float, Tensor], b: dict[float, Tensor]) -> dict[float, Tensor]:
    return a | {key: a[key] + counts if key in a else counts for key, counts in b.items()}


def _signal(x: Tensor) -> Signal:
    signal = Signal()
    signal.add(x)
    return signal


def _count(x: Tensor, chosen: list[Candidate], functions: list[ScaleFunction]) -> list[Tally]:
    tallies, wide = [empty_tally(c) for c in chosen], x.double()
    for tally, c, scale_of in zip(tallies, chosen, functions):
        add(tally, x, wide, c, scale_of)
    return tallies


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch computes with, each of them computing alone, as this one does meanwhile.

    What OpenMP's threads spend on waiting for the next of many small operations is several times the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
