"""ONNX: torch.onnx.export needs nothing from the user, and onnxruntime on the CPU gives the eager bits."""

import functools
import io
import logging

import pytest
import torch
from conftest import FORMATS, NAMED, WIDE, WIDE_NAMED, assert_same_bits, near_ties, points_of
from torch import nn

from altgrad.quantization import (
    E2M1,
    E3M4,
    E5M2,
    MXFP8_E4M3,
    NVFP4,
    PerAxis,
    PerBlock,
    PerTensor,
    compute_scale,
    decode,
    dequantize,
    encode,
    encode_blocks,
    quantize,
    quantize_blocks,
)
from ops_registry.modes import DETERMINISTIC_ROUNDINGS, SATURATIONS

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
altgrad_onnx = pytest.importorskip("altgrad.onnx")
pytestmark = [
    pytest.mark.compiles,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
DTYPES = [torch.float32, torch.float16, torch.float64]  # onnxruntime's CPU kernels have no bfloat16
logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is missing


@pytest.fixture(autouse=True, scope="module")
def torchlib_is_read_once():
    """Each export parses the source of every function that torch's operators may become, a quarter of its time."""
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxscript_apis, "get_torchlib_ops", functools.cache(onnxscript_apis.get_torchlib_ops))
        yield


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def export(function, args, **kwargs):
    return torch.onnx.export(Function(function).eval(), args, dynamo=True, verbose=False, **kwargs)


def run_onnx(program, args):
    buffer = io.BytesIO()
    program.save(buffer)
    session = ort.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)})
    return [torch.from_numpy(output) for output in outputs]


def assert_exports(function, args, **kwargs):
    """The exported function gives the eager bits, all of its outputs."""
    for got, want in zip(run_onnx(export(function, args, **kwargs), args), function(*args), strict=True):
        assert_same_bits(got, want)


def all_operators(format, dtype):
    def function(x, codes, scale):
        return [
            quantize(x, format, scale),
            encode(x, format, scale),
            decode(codes, format, scale, dtype=dtype),
            dequantize(x, scale),
        ]

    return function


def breaking_inputs(f, dtype, rows=256):
    """(x, codes) of one shape: every tie of the format and the specials, and every code."""
    x = near_ties(f, torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)
    n = -(-x.numel() // rows)
    x = torch.cat([x, x[: n * rows - x.numel()]]).view(rows, n)
    return x, torch.arange(256).to(torch.uint8)[:, None].expand(rows, n).contiguous()


def scale_of(kind, x):
    if kind == "scalar":
        return torch.tensor(0.37)
    n = x.shape[1] if kind == "row" else x.shape[0]
    return torch.linspace(0.1, 3.0, n).view((n,) if kind == "row" else (n, 1))


PAIRS = [(dtype, kind) for dtype in DTYPES for kind in ("scalar", "row", "column")]


@pytest.mark.parametrize(
    ("f", "pairs"),
    [(f, [PAIRS[i % 9]]) for i, f in enumerate(NAMED)]  # each pair once or twice
    + [pytest.param(f, PAIRS, marks=pytest.mark.slow) for f in NAMED],
    ids=lambda value: getattr(value, "name", ""),
)
def test_eager_bits(f, pairs):
    cases = [(all_operators(f, dtype), *breaking_inputs(f, dtype), kind) for dtype, kind in pairs]
    args = [t for _, x, codes, kind in cases for t in (x, codes, scale_of(kind, x))]

    def function(*args):
        outputs = [case[0](*args[3 * i : 3 * i + 3]) for i, case in enumerate(cases)]
        return [output for each in outputs for output in each]

    assert_exports(function, tuple(args))


@pytest.mark.parametrize(
    ("f", "saturations"),
    [(E5M2, ["none"])] + [pytest.param(f, SATURATIONS, marks=pytest.mark.slow) for f in NAMED],
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_roundings_and_saturations(f, saturations):
    x, _ = breaking_inputs(f, torch.float32)
    generator = torch.Generator().manual_seed(0)
    bits32 = torch.randint(-(1 << 31), 1 << 31, x.shape, generator=generator).to(torch.int32)
    bits8 = torch.randint(0, 256, x.shape, generator=generator).to(torch.uint8)

    def function(x, scale, bits32, bits8):
        outputs = []
        for saturation in saturations:
            for operator in (quantize, encode):
                for rounding in DETERMINISTIC_ROUNDINGS:
                    outputs.append(operator(x, f, scale, saturation=saturation, rounding=rounding))
                for bits in (bits32, bits8):
                    outputs.append(
                        operator(x, f, scale, saturation=saturation, rounding="stochastic", random_bits=bits)
                    )
        return outputs

    assert_exports(function, (x, torch.tensor(0.37), bits32, bits8))


@pytest.mark.parametrize("spelling", ["e3m2b-60f", "e2m2b100f"])
def test_spelled_out_formats(spelling):
    """e2m2b100f has a quantum of 2^-101: no constant of the formulation may be taken for 0 or for 1."""
    f = next(f for f in FORMATS if f.name == spelling)
    x, codes = breaking_inputs(f, torch.float32)
    assert_exports(all_operators(f, torch.float32), (x, codes, torch.tensor(0.37)))


@pytest.mark.parametrize(
    "formats",
    [WIDE_NAMED, WIDE[len(WIDE_NAMED) :: 2], pytest.param(WIDE, marks=pytest.mark.slow)],
    ids=["named", "spelled", "all"],
)
def test_wide_and_unsigned_formats(formats):
    """Codes of two bytes, and constants beyond float32 or up to infinity, which no tool may cut."""
    args, dtypes = [torch.tensor(0.37)], [torch.float32, torch.float64, torch.float16]
    for i, f in enumerate(formats):
        dtype = dtypes[i % 3]
        args.append(points_of(f, torch.float64 if dtype == torch.float64 else torch.float32).to(dtype))
        args.append(torch.arange(1 << min(f.bits, 16)).to(torch.uint8 if f.bits <= 8 else torch.uint16))

    def function(scale, *args):
        outputs = []
        for f, x, codes in zip(formats, args[::2], args[1::2], strict=True):
            outputs += [quantize(x, f, scale), quantize(x, f, scale, saturation="none", rounding="toward_positive")]
            outputs += [quantize(x, f, scale, saturation="none")]
            if f.code_bytes:
                outputs += [encode(x, f, scale), decode(codes, f, scale, dtype=x.dtype)]
            else:
                outputs += [codes]
        return outputs

    assert_exports(function, tuple(args))


@pytest.mark.parametrize("value", [1 - 2**-24, 1.000003, 1e-9])
def test_constant_scales_next_to_zero_and_one(value):
    """onnxscript's optimizer takes 0-d constants near 0 and 1 for 0 and 1."""
    x, _ = breaking_inputs(E3M4, torch.float32)
    buffer = torch.tensor(value)
    assert_exports(lambda x: [quantize(x, "E3M4", value), dequantize(x, value), quantize(x, "E3M4", buffer)], (x,))


def test_dynamic_batch():
    x, codes = breaking_inputs(E5M2, torch.float32)
    function = all_operators("E5M2", torch.float32)
    scale = torch.linspace(0.1, 3.0, x.shape[1])
    batch = torch.export.Dim.DYNAMIC
    program = export(function, (x[:3], codes[:3], scale), dynamic_shapes=[({0: batch}, {0: batch}, None)])
    for rows in (3, 5, 256):
        args = (x[:rows], codes[:rows], scale)
        for got, want in zip(run_onnx(program, args), function(*args), strict=True):
            assert_same_bits(got, want)


def test_scales_and_blocks():
    """Of a method that reads no bits of a number; a last block may be smaller."""
    x = torch.randn(8, 12) * torch.logspace(-20, 20, 8)[:, None]

    def function(x):
        granularities = [PerTensor(), PerAxis(0), PerAxis(1), PerBlock(4), PerBlock((3, 5))]
        blocks = [quantize_blocks(x, "E4M3", granularity=granularity) for granularity in granularities]
        blocks += [quantize_blocks(x, **NVFP4), compute_scale(x, "E4M3", granularity=PerBlock(4))]
        return [*blocks, *encode_blocks(x, **NVFP4)[:3]]

    assert_exports(function, (x,))


def test_powers_of_two_do_not_export():
    """ONNX does not read the bits of a number. Where that ends, so should the sentence in the docs."""
    with pytest.raises(Exception, match=r"aten\.view\.dtype"):
        export(lambda x: quantize_blocks(x, **MXFP8_E4M3), (torch.ones(2, 64),))


WITH_TABLE = {"custom_translation_table": altgrad_onnx.TRANSLATION_TABLE}
FLOAT8 = [f for f in NAMED if f.spelling in altgrad_onnx.ONNX_TYPES and f.bits == 8]


class TestTranslationTable:
    """altgrad.onnx: nodes of ONNX's own types."""

    @pytest.mark.parametrize("f", FLOAT8, ids=lambda f: f.name)
    def test_eager_bits(self, f):
        x, _ = breaking_inputs(f, torch.float32)
        saturations = ["finite"] if f.has_inf else ["propagate", "finite"]

        def function(x, *scales):
            return [quantize(d, f, s, saturation=sat) for d in (x, x.half()) for s in scales for sat in saturations]

        assert_exports(function, (x, *(scale_of(kind, x) for kind in ("scalar", "row", "column"))), **WITH_TABLE)

    @pytest.mark.parametrize(
        ("scale", "nodes"),
        [
            (torch.tensor(0.37), ["QuantizeLinear", "DequantizeLinear"]),
            (torch.full((2,), 0.37), ["Div", "Cast", "Cast", "Mul"]),
        ],
        ids=["scalar", "row"],
    )
    def test_nodes(self, scale, nodes):
        program = export(lambda x, scale: quantize(x, "E4M3", scale), (torch.ones(3, 2), scale), **WITH_TABLE)
        assert [node.op_type for node in program.model.graph] == nodes

    def test_one_scale_of_the_tensor(self):
        """As docs/deployment.md says: not Div, Cast, Cast, Mul."""
        x = torch.randn(8, 12)
        function = lambda x: [quantize_blocks(x, "E4M3", granularity=PerTensor())]  # noqa: E731
        program = export(function, (x,), **WITH_TABLE)
        assert [node.op_type for node in program.model.graph][-2:] == ["QuantizeLinear", "DequantizeLinear"]
        assert_exports(function, (x,), **WITH_TABLE)

    def test_e5m2_loses_infinity(self):
        """The one difference of float8 that the docs name; where ONNX ends it, so should they."""
        x = torch.tensor([float("inf"), 1.0])
        program = export(lambda x: quantize(x, "E5M2"), (x,), **WITH_TABLE)
        assert_same_bits(run_onnx(program, (x,))[0], torch.tensor([57344.0, 1.0]))

    @pytest.mark.parametrize("kind", ["scalar", "row"])
    def test_e2m1_in_the_reference_evaluator(self, kind):
        """onnxruntime has no float4 kernels on the CPU. QuantizeLinear adds its zero point 0, which ends -0."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        x, _ = breaking_inputs(E2M1, torch.float32)
        x = x.nan_to_num(posinf=1e30, neginf=-1e30) + (0.0 if kind == "scalar" else 0)
        scale = scale_of(kind, x)
        program = export(lambda x, s: quantize(x, "E2M1", s), (x, scale), opset_version=23, **WITH_TABLE)
        buffer = io.BytesIO()
        program.save(buffer)
        evaluator = ReferenceEvaluator(onnx.load_from_string(buffer.getvalue()))
        (got,) = evaluator.run(None, dict(zip(evaluator.input_names, (x.numpy(), scale.numpy()), strict=True)))
        want = quantize(x, "E2M1", scale)
        assert_same_bits(torch.from_numpy(got), want if kind == "row" else torch.where(x == 0, 0.0, want))

    @pytest.mark.parametrize(
        ("dtype", "arguments"),
        [
            (torch.float32, {"format": "E3M4"}),
            (torch.float32, {"format": "BF16"}),
            (torch.float32, {"format": "E8M0"}),
            (torch.float32, {"format": "E4M3", "rounding": "toward_zero"}),
            (torch.float32, {"format": "E4M3", "saturation": "none"}),
            (torch.float64, {"format": "E4M3"}),
        ],
        ids=["format", "BF16", "E8M0", "rounding", "saturation", "dtype"],
    )
    def test_refuses_what_the_types_cannot_do(self, dtype, arguments):
        with pytest.raises(Exception, match="export without the translation table"):
            export(lambda x: quantize(x, **arguments), (torch.ones(2, dtype=dtype),), **WITH_TABLE)


@pytest.mark.parametrize("method", ["amax", "percentile"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerBlock(8)], ids=str)
def test_nan_shows_in_a_scale(granularity, method):
    """Wherever it is: ReduceMax of onnxruntime keeps it in the first place alone."""

    def scale_of(x):
        return compute_scale(x, "E4M3", granularity=granularity, method=method)

    program = export(scale_of, (torch.randn(2, 24),))
    for place in range(24):
        x = torch.randn(2, 24)
        x[place % 2, place] = torch.nan
        assert_same_bits(run_onnx(program, (x,))[0], scale_of(x))
