"""The report of a checkpoint: every weight under every candidate, on all cores."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from operator import add as add_tensors
from pathlib import Path

import torch
from torch import Tensor

from ops_registry.checks import FLOAT_DTYPES

from .candidates import DEFAULT, Candidate, candidates
from .checkpoint import Checkpoint, Entry
from .results import Layer, LeftOut, Report
from .tally import (
    ScaleFunction,
    Signal,
    Tally,
    add,
    distinct,
    empty_tally,
    matrix,
    parts,
    patterns,
    scale_function,
)

_FLOATS = [str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES]


def report_weights(
    path: str | Path, candidates: Iterable[str] = DEFAULT, progress: Callable[[int, int], None] | None = None
) -> Report:
    """What each candidate does to each tensor of a checkpoint.

    For a tensor w seen as the matrix ``w.flatten(1)`` and the scale that :func:`altgrad.quantization.compute_scale`
    finds for the candidate, the scores are those of :func:`altgrad.quantization.quantization_stats`. Tensors are read
    one at a time. Integer and empty tensors are listed as left out.

    Args:
        path: see :class:`Checkpoint`.
        candidates: names or spellings, see :func:`candidate`.
        progress: called with the elements done and those of all tensors.

    Raises:
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
    chosen = _candidates(candidates)
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


_candidates = candidates  # report_weights has an argument of that name


def _reason(entry: Entry) -> str | None:
    """Why a tensor is left out."""
    if entry.dtype not in _FLOATS:
        return f"{entry.dtype}: not one of {', '.join(_FLOATS)}"
    return "empty" if entry.count == 0 else None


def _layer(entry: Entry, x: Tensor, chosen: list[Candidate], pool: ThreadPoolExecutor) -> Layer:
    x = matrix(x)
    by_value = [c for c in chosen if _goes_by_value(c, x)]
    by_part = [c for c in chosen if c not in by_value]
    counted: dict[str, Tally] = {}
    if by_value:
        signal, counted = _count_values(x, by_value, pool)
    if by_part:
        functions = [scale_function(x, c) for c in by_part]
        found = pool.map(lambda part: _count(part, by_part, functions), parts(x, by_part))
        signal, tallies = reduce(_sum, found)
        counted |= {c.name: tally for c, tally in zip(by_part, tallies)}
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


Counted = tuple[Signal, list[Tally]]


def _goes_by_value(c: Candidate, x: Tensor) -> bool:
    """Whether one scale serves all of x, and x has more values than there are different ones."""
    return c.rule.per == "tensor" and x.dtype.itemsize == 2 and x.numel() > 1 << 17


def _count_values(x: Tensor, chosen: list[Candidate], pool: ThreadPoolExecutor) -> tuple[Signal, dict[str, Tally]]:
    """Looks at each different value once, and at how often it is there."""
    counts = reduce(add_tensors, pool.map(distinct, parts(x, chosen)))
    values, present = patterns(x.dtype), counts.unsqueeze(0) > 0
    values, counts = values[present].unsqueeze(0), counts.unsqueeze(0)[present].unsqueeze(0)
    signal, tallies = Signal(), {c.name: empty_tally(c) for c in chosen}
    signal.add(values, counts)
    for c in chosen:
        add(tallies[c.name], values, c, scale_function(x, c), counts=counts)
    return signal, tallies


def _count(x: Tensor, chosen: list[Candidate], scale_functions: list[ScaleFunction]) -> Counted:
    signal, tallies = Signal(), [empty_tally(c) for c in chosen]
    signal.add(x)
    for tally, c, scale_of in zip(tallies, chosen, scale_functions):
        add(tally, x, c, scale_of)
    return signal, tallies


def _sum(a: Counted, b: Counted) -> Counted:
    return a[0] + b[0], [x + y for x, y in zip(a[1], b[1])]


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch computes with, each of them computing alone."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
