"""torch.library.opcheck, all its tests, for every operator over dtypes, layouts and gradients."""

import pytest
import torch
from conftest import DTYPES
from samples import SAMPLES
from torch.testing._internal.optests.generate_tests import DEFAULT_TEST_UTILS
from torch.utils import _pytree as pytree

from ops_registry.operators import OPERATORS

ag = torch.ops.altgrad

LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 3, 4),
    "transposed": lambda: torch.randn(2, 4, 3).transpose(1, 2),
    "sliced": lambda: torch.randn(4, 6, 8)[::2, ::2, ::2],
    "channels_last": lambda: torch.randn(2, 3, 2, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(3, 1).expand(2, 3, 4),
    "empty": lambda: torch.randn(2, 0, 4),
    "0-d": lambda: torch.randn(()),
}


def is_slow(i, j):
    """Every layout and every dtype are in each run, all pairs of them in the slow one."""
    return (i + j) % len(DTYPES) != 0


pairs = pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param(layout, dtype, marks=[pytest.mark.slow] * is_slow(i, j))
        for i, layout in enumerate(LAYOUTS)
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)


# As pairs, but each operator in every third layout; the first one is in the quick run, and the others are not.
traced = [
    pytest.param(name, layout, dtype, marks=[pytest.mark.compiles] * (i > 0) + [pytest.mark.slow] * slow)
    for n, name in enumerate(SAMPLES)
    for i, layout in enumerate(LAYOUTS)
    for j, dtype in enumerate(DTYPES)
    for slow in [is_slow(i, j) or (i > 0 and (i + n) % 3 > 0)]
]
gradients = pytest.mark.parametrize("requires_grad", [False, True])


@pytest.fixture(autouse=True)
def every_operation_is_computed():
    """A fake tensor's operations are not looked up: each comes once, and its key has all symbols, a third of the time.

    The cache holds torch's own operations alone, never ours.
    """
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


def sample(name, layout, dtype, requires_grad, device):
    """An operator and its arguments."""
    x = LAYOUTS[layout]().to(device, dtype)
    row, column = x.shape[-1:], [*x.shape[-2:-1], 1][: x.ndim]
    scale = torch.rand((row, column, ())[[*SAMPLES].index(name) % 3], device=device) + 0.1
    return getattr(ag, name).default, SAMPLES[name](x.detach().requires_grad_(requires_grad), scale)


@pairs
@gradients
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, layout, dtype, requires_grad, device):
    torch.library.opcheck(*sample(name, layout, dtype, requires_grad, device), test_utils=DEFAULT_TEST_UTILS[:3])


@gradients
@pytest.mark.parametrize(("name", "layout", "dtype"), traced, ids=str)
def test_opcheck_by_tracing(name, layout, dtype, requires_grad, device):
    op, args = sample(name, layout, dtype, requires_grad, device)
    # Where no gradient follows, AOTAutograd makes the graph that it makes without requires_grad.
    if not requires_grad or any(t.requires_grad for t in pytree.tree_leaves(op(*args))):
        torch.library.opcheck(op, args, test_utils=DEFAULT_TEST_UTILS[3:])


@pairs
@gradients
def test_opcheck_of_a_scale_that_requires_grad(layout, dtype, requires_grad, device):
    x = LAYOUTS[layout]().to(device, dtype).detach().requires_grad_(requires_grad)
    scale = torch.tensor(0.5, device=device, requires_grad=requires_grad)
    torch.library.opcheck(ag.quantize.default, (x, scale, "E4M3FNUZ"))


def test_tracing_is_the_last_of_the_tests():
    assert DEFAULT_TEST_UTILS[3:] == ["test_aot_dispatch_dynamic"]


def test_samples():
    assert set(SAMPLES) == set(OPERATORS)
