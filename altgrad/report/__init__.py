"""Which format suits a model: its weights, or all operands of its products on data, under every candidate."""

from .assign import Assignment, assign
from .candidates import DEFAULT, Candidate, candidate
from .measure import measure
from .page import write
from .results import Layer, LeftOut, Report, Score
from .weights import report_weights

__all__ = [
    "DEFAULT",
    "Assignment",
    "Candidate",
    "Layer",
    "LeftOut",
    "Report",
    "Score",
    "assign",
    "candidate",
    "measure",
    "report_weights",
    "write",
]
