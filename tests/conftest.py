"""What the tests share: the formats, the devices, inputs that break roundings, and the comparison of bits."""

import atexit
import functools
import gc
import os
import re
import subprocess
import tempfile

import numpy as np
import pytest
import reference
import torch

from altgrad.quantization import FORMAT_REGISTRY, resolve
from ops_registry.modes import RANDOM_BITS, SEED

# Of several processes of tests each computes on one thread, and so do those that they start: with more threads than
# cores, each waits spinning for the others. Tests of threads ask for them. (The variable alone comes too late: pytest
# imports torch for the category of a warning in pyproject.toml, before this file.)
if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# A run must never pass on code that an earlier state of the package compiled; its own processes share what they do.
if "altgrad-inductor-" not in os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""):
    _inductor_cache = tempfile.TemporaryDirectory(prefix="altgrad-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache.name
# Inductor's pool of processes takes longer to start than the small graphs of tests to compile.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# For each instruction set of the CPU each process would start another, to load what it has compiled as a trial.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def name_operators_of_torchvision():
    """torchvision's library is for the CUDA build of torch; its models, and transformers', need no more than names."""
    try:
        import torchvision
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


# Signed and of one byte; test_wide_formats.py has the others.
NAMED = [f for f in FORMAT_REGISTRY.values() if f.bits <= 8 and f.is_signed]
# Every combination of specials, and every edge of the grammar: no exponent, no mantissa, one bit of each, far biases.
_SPELLINGS = """
e3m4b3 e4m3b7 e4m3b11fnuz e5m2b15fn e5m2b1f e3m0b3f e2m0b1fn e1m0b0f e4m0b8fnuz e6m0b31fn
e7m0b30fn e0m1b1f e0m7b20f e0m3b1fnuz e0m5b-9fn e1m2b1 e1m6b1 e3m2b-60f e2m2b100f
"""
SPELLED = [resolve(spelling) for spelling in _SPELLINGS.split()]
FORMATS = NAMED + SPELLED
WIDE_NAMED = [f for f in FORMAT_REGISTRY.values() if f.bits > 8 or not f.is_signed]
# DeepSeek's, other papers', every kind of specials, P3109's unsigned ones, and the ends of float32's range.
_WIDE_SPELLINGS = """
e5m6b15 e6m9b31 e4m9b7fn e7m8b64fnuz e0m15b1f e1m14b20f e5m13b15
e4m3b16fnu e5m3b16u e2m1b1fu e0m8b1fu e0m4b1fnu e7m0b63fnu e6m0b140fu e8m1b127u e5m10b130fnu e8m7b128fnuz e2m2b145f
"""
WIDE = WIDE_NAMED + [resolve(spelling) for spelling in _WIDE_SPELLINGS.split()]
# Random bits given for each element, and not the seed that they follow from.
GIVEN_BITS = {dtype: n for dtype, n in RANDOM_BITS.items() if dtype != SEED}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# Of several processes none should be left with one of these alone: they come first, the longest at the front.
LONG = [
    *("opcheck", "distributed", "compile", "sanitizers", "interpreter", "onnx", "rounding", "simulation_compile"),
    *("deploy", "scaling", "cpu", "wide_formats", "transforms", "cache", "export", "encode_blocks", "blocks"),
    *("quantize_operands", "simulation_products", "simulation_accumulators", "simulation_architectures"),
    *("quantize_blocks", "numerics", "layout", "docs", "report_cli", "two_levels", "random", "gradients", "imports"),
]


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist begins with the files of the most tests
    if hasattr(config, "workerinput"):  # one of several processes, which has sent what it has to say when it exits:
        atexit.register(os._exit, 0)  # to free all objects one by one takes seconds


def pytest_sessionstart():
    gc.disable()


def pytest_collection_finish():
    """Ten thousand tests are no garbage: a search for some leaves them out."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        gc.unfreeze()


def pytest_collection_modifyitems(config, items):
    """Leaves out GPU tests where there is no GPU, and slow ones unless they are asked for: ``-m slow``.

    The files of LONG come first where there are several processes.
    """
    left_out = {"gpu"} - ({"gpu"} if torch.cuda.is_available() else set())
    left_out |= {"slow"} - set(re.findall(r"\w+", config.option.markexpr))
    kept, deselected = [], []
    for item in items:
        (deselected if left_out & {marker.name for marker in item.iter_markers()} else kept).append(item)
    config.hook.pytest_deselected(items=deselected)
    if hasattr(config, "workerinput"):  # one of several processes
        places = {f"test_{name}": place for place, name in enumerate(LONG)}
        kept.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
    items[:] = kept


@functools.cache
def let_inductor_remember():
    """Its one table of dtypes is filled again for each operation of a kernel: a sixth to a third of its Python.

    And sympy intersects the same few ranges of values for each use of a constant: a tenth to a sixth of what is left.
    """
    from torch._inductor.codegen import common

    common.DtypePropagationOpsHandler = functools.cache(common.DtypePropagationOpsHandler)
    common.ValueRanges.tighten = functools.cache(common.ValueRanges.tighten)


@pytest.fixture(autouse=True)
def _compiles_only_where_marked(request, monkeypatch):
    """Holds the marker ``compiles`` to its word: no other test starts Inductor or a process.

    Those of a GPU may, since Triton compiles.
    """
    if request.node.get_closest_marker("compiles") or request.node.get_closest_marker("gpu"):
        let_inductor_remember()
        return

    def refuse(*args, **kwargs):
        pytest.fail("this test starts a compiler or a process: mark it with pytest.mark.compiles")

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", refuse)
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.fixture
def each_value_is_traced_once(monkeypatch):
    """Inductor traces a value anew for each use of it, and then drops the lines that it has: most of its Python.

    How many there were decides about loops of a few elements and strided ones, so this is for others, whose code is the
    same (test_compile.py).
    """
    from torch._inductor import ir, utils
    from torch._inductor.virtualized import V

    def make_loader(self, make=ir.Pointwise.make_loader):
        load = make(self)
        once = functools.lru_cache(1)(lambda handler, index: load(index))
        return lambda index: once(V.get_ops_handler(), tuple(index))

    monkeypatch.setattr(ir.Pointwise, "make_loader", utils.cache_on_self(make_loader))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def bits(tensor):
    """The bits of a tensor as integers, every NaN as one."""
    if not tensor.dtype.is_floating_point:
        return tensor.to(torch.int64)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integers).to(torch.int64).masked_fill(tensor.isnan(), -1)


def assert_same_bits(got, want, inputs=None):
    """got and want agree in dtype, shape and every bit (NaN equals NaN, -0 differs from +0)."""
    got, want = got.detach().cpu(), want.detach().cpu()
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    wrong = (bits(got) != bits(want)).flatten()
    if wrong.any():
        where = wrong.nonzero().flatten()[:5].tolist()
        values = [t.flatten()[where].tolist() for t in (got, want)]
        given = None if inputs is None else inputs.detach().cpu().expand(got.shape).flatten()[where]
        shown = (
            None
            if given is None
            else [(v, hex(b & (1 << 64) - 1)) for v, b in zip(given.tolist(), bits(given).tolist())]
        )
        pytest.fail(
            f"{int(wrong.sum())} of {wrong.numel()} differ at {where}: input {shown}, got {values[0]}, want {values[1]}"
        )


def near_ties(f, dtype=torch.float32):
    """Every value and midpoint of a format with its neighbours by one ulp, powers of two, specials; both signs."""
    numpy_dtype = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    values, midpoints = reference.grid(f)
    points = np.concatenate([values, midpoints, values[-1] * np.array([1.5, 2, 1e3, 1e8])]).astype(numpy_dtype)
    points = np.concatenate([points, np.nextafter(points, numpy_dtype(0)), np.nextafter(points, numpy_dtype(np.inf))])
    exponents = np.arange(-149, 128) if dtype == torch.float32 else np.arange(-1074, 1024, 7)
    limits = np.finfo(numpy_dtype)
    points = np.concatenate(
        [points, np.ldexp(1.0, exponents).astype(numpy_dtype), [np.inf, np.nan, limits.max, limits.tiny]]
    )
    points = points.astype(numpy_dtype)
    return torch.from_numpy(np.concatenate([points, -points]))


def points_of(f, dtype=torch.float32):
    """Values and midpoints, all of a small format, with their neighbours; specials and the ends of the dtype."""
    numpy_dtype = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    values, midpoints = reference.grid(f)
    few = np.unique(np.concatenate([np.arange(200), np.arange(0, len(midpoints), 1 + len(midpoints) // 1500)]))
    few = np.unique(np.concatenate([few, len(midpoints) - 1 - few]))
    few = few[(few >= 0) & (few < len(midpoints))]
    with np.errstate(over="ignore"):
        points = np.concatenate([values[few], midpoints[few], values[-2:] * 1.5]).astype(numpy_dtype)
    points = np.concatenate([points, np.nextafter(points, numpy_dtype(0)), np.nextafter(points, numpy_dtype(np.inf))])
    limits = np.finfo(numpy_dtype)
    edges = np.array([0, np.inf, np.nan, limits.max, limits.tiny, limits.smallest_subnormal], numpy_dtype)
    points = np.concatenate([points, edges])
    return torch.from_numpy(np.concatenate([points, -points]))


def random_bit_patterns(n, seed=0):
    """float32 numbers of every exponent, NaN and infinities among them."""
    integers = np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)
    return torch.from_numpy(integers.view(np.float32))


def all_inputs(dtype):
    """All 65,536 numbers of a 16-bit dtype."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)


def reference_quantize(f, x, scale, *args, **kwargs):
    """The definition for tensors of any floating dtype: float32 arithmetic but for float64."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    result = reference.quantize(f, x.cpu().to(compute).numpy(), scale.cpu().to(compute).numpy(), *args, **kwargs)
    return torch.from_numpy(np.asarray(result)).to(x.dtype)


def reference_encode(f, x, scale, *args, **kwargs):
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.from_numpy(
        reference.encode(f, x.cpu().to(compute).numpy(), scale.cpu().to(compute).numpy(), *args, **kwargs)
    )


def reference_quantize_and_encode(f, x, scale, *args):
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    values, codes = reference.quantize_and_encode(
        f, x.cpu().to(compute).numpy(), scale.cpu().to(compute).numpy(), *args
    )
    return torch.from_numpy(np.asarray(values)).to(x.dtype), torch.from_numpy(codes)


def reference_decode(f, codes, scale, dtype=torch.float32):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.from_numpy(np.asarray(reference.decode(f, codes.numpy(), scale.to(compute).numpy()))).to(dtype)
