"""altgrad.report on checkpoints: numbers as computed by hand, files of every kind, and what cannot be reported."""

import json
import math
import struct

import pytest
import torch

from altgrad.quantization import compute_scale, encode_blocks, quantization_stats
from altgrad.report import DEFAULT, Report, candidate, report_weights
from altgrad.report import weights as weights_module
from altgrad.report.tally import PART, one_scale

safetensors = pytest.importorskip("safetensors.torch")

CANDIDATES = [*DEFAULT, "E4M3@row", "E4M3@2x16", "E5M2@7", "E4M3FNUZ", "E7M0", "e3m2b3f@row/rceil", "E2M1@5/E4M3"]


def weights(seed=0):
    """Tensors that show what differs: dtypes, shapes, ragged blocks, zeros, outliers, more than one part."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    outliers = normal(33, 70)
    outliers[3, 5], outliers[7] = 300.0, 0.0
    return {
        "plain": normal(64, 128),
        "half": (normal(48, 100) * 1e-3).half(),
        "brain": normal(PART // 256 + 100, 256).bfloat16(),
        "double": normal(9, 11).double(),
        "outliers": outliers,
        "conv": normal(8, 4, 3, 3),
        "bias": normal(37),
        "scalar": normal(()),
        "wide": 2 ** (normal(40, 40) * 12),
        "zeros": torch.zeros(4, 8),
    }


def by_hand(x, c):
    """The scores of a candidate from the functions of altgrad.quantization, on the whole matrix."""
    x = x.flatten(1) if x.ndim > 1 else x.reshape(1, -1)
    scale = compute_scale(x, c.format, granularity=c.granularity, **c.keywords)
    return quantization_stats(x, c.format, scale), (scale.double().amax() / scale.double().amin()).log2().item()


def assert_as_by_hand(report, tensors):
    for layer in report.layers:
        for name in report.candidates:
            got = layer.scores[name]
            stats, spread = by_hand(tensors[layer.name], candidate(name))
            for share in ("clipped", "flushed", "used_bits"):
                assert getattr(got, share) == getattr(stats, share).item(), (layer.name, name, share)
            # The same float64 squares, added in another order.
            want = stats.sqnr.item()
            assert got.sqnr == pytest.approx(want, rel=1e-12, nan_ok=True), (layer.name, name)
            assert got.scale_spread == pytest.approx(spread, rel=1e-15, nan_ok=True), (layer.name, name)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_scores_are_those_computed_by_hand(tmp_path, suffix):
    tensors = weights()
    path = tmp_path / f"model.{suffix}"
    safetensors.save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    report = report_weights(path, CANDIDATES)
    assert {layer.name for layer in report.layers} == set(tensors)
    assert_as_by_hand(report, tensors)


def test_scores_by_value_are_those_computed_by_hand(tmp_path, monkeypatch):
    """Tensors of 16 bits of any size, block after block by the scale that it has."""
    monkeypatch.setattr(weights_module, "_BY_VALUE", -1)
    monkeypatch.setattr(weights_module, "_BY_SCALE_AND_VALUE", -1)
    seen = []
    monkeypatch.setattr(weights_module, "one_scale", lambda *args: seen.append(args) or one_scale(*args))
    tensors = {
        f"{name}.{dtype}": x.to(dtype) for name, x in weights(1).items() for dtype in (torch.float16, torch.bfloat16)
    }
    tensors = {name: x for name, x in tensors.items() if x.isfinite().all()}
    assert len(tensors) == 19  # the wide one is beyond float16
    torch.save(tensors, tmp_path / "a.pt")
    names = [*CANDIDATES, "E4M3@row/floor", "E2M1@2x16/floor", "e2m2b100f@32/floor"]
    assert_as_by_hand(report_weights(tmp_path / "a.pt", names), tensors)
    floors = [candidate(name) for name in names if candidate(name).rule.power_of_two == "floor"]
    groups = {c: sum(args[1] == c for args in seen) for c in floors}
    assert len(floors) == 9 and min(groups.values()) > 2 * len(tensors)  # several scales a tensor


def test_blocks_of_subnormals_by_value(tmp_path, monkeypatch):
    """Each has the scale of its largest element, also where that is below 2^-126."""
    monkeypatch.setattr(weights_module, "_BY_SCALE_AND_VALUE", -1)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=g).mul(2.0 ** torch.arange(-133.0, -69).view(-1, 1)).bfloat16()
    x[:, :16] = 0
    torch.save({"x": x}, tmp_path / "a.pt")
    names = ["MXFP4", "e2m2b100f@16/floor", "E5M2@32/floor", "E4M3@row/floor"]
    assert_as_by_hand(report_weights(tmp_path / "a.pt", names), {"x": x})


def test_doubles_whose_squares_have_not_their_range(tmp_path):
    """Large and small ones, in one part and in several, and errors far below the values."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(9, 11, generator=g, dtype=torch.float64)
    tensors = {str(size): x * size for size in (1e308, 1e160, 1e-160, 1e-308, 1e-320)}
    tensors |= {"zeros": x * 0, "exact but one": torch.tensor([[1.0, 1.1e-200]], dtype=torch.float64)}
    tensors["parts"] = torch.rand(3, PART, generator=g, dtype=torch.float64)
    tensors["parts"] *= torch.tensor([[1e-200], [0.0], [1e200]], dtype=torch.float64)
    torch.save(tensors, tmp_path / "a.pt")
    report = report_weights(tmp_path / "a.pt", ["E4M3", "E5M2@row", "E2M1@4/E4M3", "E8M0"])
    assert_as_by_hand(report, tensors)
    assert all(math.isfinite(layer.scores["E4M3"].sqnr) for layer in report.layers if layer.name != "zeros")


def test_formats_of_two_bytes_and_without_a_sign(tmp_path):
    """torch counts no uint16; E8M0 has no code of zero, and below zero UE4M3 does not clip."""
    tensors = {"w": torch.tensor([[0.0, 0.0, 1.0, -1000.0], [3e-8, 1000.0, 0.3, -2.0]])}
    tensors |= {name: weights()[name] for name in ("plain", "half", "outliers")}
    torch.save(tensors, tmp_path / "a.pt")
    names = ["FP16", "BF16@row", "e4m4b7", "e5m6b15@32/floor", "E8M0", "UE4M3", "e3m2b3fnu@2x2/floor"]
    report = report_weights(tmp_path / "a.pt", names)
    assert_as_by_hand(report, tensors)


def test_what_a_scale_at_the_end_of_its_range_clips(tmp_path):
    """A scale that would be above 2^127: of E8M0, or a float32 number."""
    x = torch.tensor([[4.0, 1.0, -0.5, 3e-38]])
    torch.save([x], tmp_path / "a.pt")
    report = report_weights(tmp_path / "a.pt", ["e0m7b126f@32/rceil", "e0m7b126f", "e0m7b126f@row"])
    assert_as_by_hand(report, {"0": x})
    assert report.layers[0].scores["e0m7b126f@32/rceil"].clipped > 0


def test_blocks_of_one_element_at_the_end_of_a_part(tmp_path):
    """They were taken for the whole matrix, and got a scale of the tensor of their own."""
    g = torch.Generator().manual_seed(0)
    tensors = {"row": torch.randn(1, 17, generator=g), "parts": torch.randn(3, PART + 1, generator=g)}
    torch.save(tensors, tmp_path / "a.pt")
    assert_as_by_hand(report_weights(tmp_path / "a.pt", ["NVFP4", "E2M1@2/UE5M3"]), tensors)


def test_a_layer_counts_its_values(tmp_path):
    x = torch.tensor([[0.0, 1.0, -1.5, 2.0], [math.nan, math.inf, 0.3, -0.0]])
    torch.save([x], tmp_path / "a.pt")
    (layer,) = report_weights(tmp_path / "a.pt", ["E4M3"]).layers
    assert (layer.name, layer.count, layer.zeros, layer.nan, layer.infinite) == ("0", 8, 2, 1, 1)
    assert layer.octaves == {0: 2, 1: 1, -2: 1}
    assert math.isnan(layer.scores["E4M3"].sqnr)  # shown, not hidden


@pytest.mark.parametrize("by_value", [False, True])
def test_scales_of_nan(tmp_path, monkeypatch, by_value):
    """Zeros that become NaN are not flushed; a scale spread is NaN wherever the scale is, in whichever part."""
    monkeypatch.setattr(weights_module, "_BY_VALUE", -1 if by_value else math.inf)
    zeros = [0.0, 0.0, 1.0]
    tensors = {"infinite": torch.tensor([[math.inf, *zeros]]), "nan": torch.tensor([[*zeros, math.nan], [*zeros, 2.0]])}
    tensors |= {f"{name}.half": x.half() for name, x in tensors.items()}
    for row in range(3):
        tensors[f"part {row}"] = torch.ones(3, PART)
        tensors[f"part {row}"][row, 5] = math.nan
    torch.save(tensors, tmp_path / "a.pt")
    names = ["E4M3", "E4M3@row", "E4M3FNUZ@2", "MXFP4", "NVFP4", "E7M0", "E8M0", "e3m2b3fnu@2/floor"]
    report = report_weights(tmp_path / "a.pt", names)
    assert_as_by_hand(report, tensors)
    assert report.layers[0].scores["E4M3"].flushed == 0
    assert all(math.isnan(layer.scores["E4M3@row"].scale_spread) for layer in report.layers)


def test_results_do_not_depend_on_the_number_of_threads(tmp_path):
    torch.save(weights(), tmp_path / "a.pt")
    before = torch.get_num_threads()
    reports = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            reports.append(report_weights(tmp_path / "a.pt", ["E4M3", "NVFP4"]).to_json())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert reports[0] == reports[1]


def test_json_there_and_back(tmp_path):
    torch.save({"a": torch.tensor([[math.nan, 1.0]]), "b": torch.ones(2, 2)}, tmp_path / "a.pt")
    report = report_weights(tmp_path / "a.pt", ["E4M3"])
    text = report.to_json()
    assert "NaN" not in text and "Infinity" not in text
    assert Report.from_json(text).to_json() == text
    assert Report.from_json(text).layers[1].scores["E4M3"].sqnr == math.inf
    for loss in (0.5, math.inf, math.nan):
        report.loss = loss
        assert repr(Report.from_json(report.to_json()).loss) == repr(loss)


def test_shards_and_folders(tmp_path):
    tensors = weights()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:4], "model-2.safetensors": names[4:]}
    for file, part in shards.items():
        safetensors.save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    by_index = report_weights(tmp_path / "model.safetensors.index.json", ["MXFP4"])
    by_folder = report_weights(tmp_path, ["MXFP4"])
    assert by_index.layers == by_folder.layers
    assert_as_by_hand(by_index, tensors)
    copied = {name: tensors[name] for name in names[3:]}  # one of them is in both shards: the index says which counts
    safetensors.save_file(copied, tmp_path / "model-2.safetensors")
    assert report_weights(tmp_path, ["MXFP4"]).layers == by_folder.layers


def trained():
    """A model's and its optimizer's state."""
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model.state_dict(), optimizer.state_dict()


def test_folders_of_libraries(tmp_path):
    """The weights, not an optimizer's state, one precision of several, not what lies beside."""
    model, optimizer = trained()
    half = {name: x.half() for name, x in model.items()}
    torch.save(optimizer, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="no weights in the folder"):
        report_weights(tmp_path, ["E4M3"])
    torch.save(model, tmp_path / "last.bin")
    found = report_weights(tmp_path, ["E4M3"])
    assert [layer.name for layer in found.layers] == ["weight", "bias"]
    torch.save(half, tmp_path / "part.bin")
    with pytest.raises(ValueError, match=r"weight is in last\.bin and in part\.bin: give one of them itself"):
        report_weights(tmp_path, ["E4M3"])
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.safetensors", "model.safetensors"):
        torch.save(model, tmp_path / name) if name.endswith("bin") else safetensors.save_file(model, tmp_path / name)
        safetensors.save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
        (tmp_path / "last.bin").write_bytes(b"not read")
        found = report_weights(tmp_path, ["E4M3"])
        assert {layer.name: layer.dtype for layer in found.layers} == {"weight": "float32", "bias": "float32"}


def test_states_of_optimizers_are_left_out(tmp_path):
    model, optimizer = trained()
    torch.save({"model": model, "optimizers": [optimizer]}, tmp_path / "a.pt")
    report = report_weights(tmp_path / "a.pt", ["E4M3"])
    assert [layer.name for layer in report.layers] == ["model.weight", "model.bias"]
    assert [(entry.name, entry.reason.partition(":")[0]) for entry in report.left_out] == [
        ("optimizers.0", "state of an optimizer")
    ]
    torch.save(optimizer, tmp_path / "a.pt")  # asked for itself
    assert "state.0.exp_avg" in [layer.name for layer in report_weights(tmp_path / "a.pt", ["E4M3"]).layers]


def test_tied_tensors_are_reported_once(tmp_path):
    w = torch.randn(4, 8)
    torch.save({"embedding": w, "head": w, "part": w[:2]}, tmp_path / "a.pt")
    report = report_weights(tmp_path / "a.pt", ["E4M3"])
    assert [(layer.name, layer.also) for layer in report.layers] == [("embedding", ["head"]), ("part", [])]


def test_integer_and_empty_tensors_are_left_out(tmp_path):
    tensors = {"w": torch.ones(2, 2), "steps": torch.arange(3), "none": torch.ones(0, 3)}
    tensors["small"] = torch.ones(2).to(torch.float8_e4m3fn)
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        safetensors.save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
        report = report_weights(path, ["E4M3"])
        assert [layer.name for layer in report.layers] == ["w"]
        assert {entry.name for entry in report.left_out} == {"steps", "none", "small"}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch: nested and CSR tensors are prototypes
def test_sparse_nested_and_meta_tensors_are_left_out(tmp_path):
    pieces = [torch.ones(2), torch.ones(3)]
    others = {
        "sparse_coo float32": torch.eye(3).to_sparse(),
        "sparse_csr float32": torch.eye(3).to_sparse_csr(),
        "nested float32": torch.nested.nested_tensor(pieces),
        "nested float64": torch.nested.nested_tensor(pieces, layout=torch.jagged, dtype=torch.float64),
        "meta bfloat16": torch.ones(2, 2, device="meta", dtype=torch.bfloat16),
    }
    torch.save({"w": torch.ones(2, 2), **others}, tmp_path / "a.pt")
    report = report_weights(tmp_path / "a.pt", ["E4M3"])
    assert [layer.name for layer in report.layers] == ["w"]
    assert [(name, reason.partition(":")[0]) for name, reason in report.left_out] == [(x, x) for x in others]


def test_a_transposed_tensor_of_a_pickle(tmp_path):
    x = torch.randn(70, 40).t()
    torch.save({"x": x}, tmp_path / "a.pt")
    assert_as_by_hand(report_weights(tmp_path / "a.pt", ["MXFP4", "E4M3@row"]), {"x": x})


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def bad_files(folder):
    """path -> a part of the message."""
    good = folder / "good.safetensors"
    safetensors.save_file({"w": torch.ones(64, 64)}, good)
    torch.save({"w": torch.ones(64, 64)}, folder / "good.pt")
    contents = {
        "truncated.safetensors": good.read_bytes()[:-100],
        "foreign.safetensors": b"PK\x03\x04 no tensors here",
        "huge.safetensors": struct.pack("<Q", 1 << 62),
        "empty.safetensors": b"",
        "empty.pt": b"",
        "truncated.pt": (folder / "good.pt").read_bytes()[:-500],
        "foreign.pt": b"hello\nworld",
        "page.html": b"<p>",
        "broken.index.json": b"{",
        "list.index.json": b"[]",
        "outside.index.json": json.dumps({"weight_map": {"w": "../good.safetensors"}}).encode(),
        "promised.index.json": json.dumps({"weight_map": {"v": "good.safetensors"}}).encode(),
        "missing.index.json": json.dumps({"weight_map": {"w": "none.safetensors"}}).encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save({"w": Evil()}, folder / "evil.pt")
    torch.save({"step": 3}, folder / "number.pt")
    torch.save({"w": torch.arange(3)}, folder / "integers.pt")
    within = {"w": torch.ones(2, 2)}
    within["self"] = within
    torch.save(within, folder / "within.pt")
    torch.save({"a": {"w": torch.ones(2, 2)}, "a.w": torch.zeros(2, 2)}, folder / "alike.pt")
    (folder / "void").mkdir()
    others = "evil.pt", "number.pt", "integers.pt", "within.pt", "alike.pt", "void", "none.pt"
    return [folder / name for name in (*contents, *others)]


def test_bad_files_are_one_line(tmp_path, capfd):
    for path in bad_files(tmp_path):
        with pytest.raises(ValueError, match=path.name) as raised:
            report_weights(path, ["E4M3"])
        assert "\n" not in str(raised.value) and not str(raised.value).endswith(": "), path
    assert "executed" not in capfd.readouterr().out


def test_a_pickled_model_is_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"it holds torch\.nn\.\S+Linear; of a model, save the state_dict$"):
        report_weights(tmp_path / "model.pt", ["E4M3"])


@pytest.mark.parametrize("name", ["E9M9", "MXFP5", "E4M3@0", "E4M3@column", "E4M3@32/up", "E4M3@", ""])
def test_unknown_candidates(name):
    with pytest.raises(ValueError):
        candidate(name)


def test_spellings_of_candidates():
    for name in CANDIDATES:
        assert candidate(name) == candidate(name.lower()) == candidate(candidate(name).name)
    assert candidate("e2m1@16/e4m3").name == "NVFP4"
    assert candidate("NVFP4").bits(4, 32) == 4 + (8 * 8 + 32) / 128
    assert candidate("MXFP4").bits(3, 33) == 4 + 6 * 8 / 99
    assert candidate("E4M3@row").bits(3, 33) == 8 + 3 * 32 / 99
    assert candidate("E4M3@2x32").bits(3, 33) == 8 + 4 * 32 / 99
    for name in ("E2M1@16/UE4M3", "E2M1@16/e4m9b7f", "E3M2@8x8/E2M1"):  # scales of 7, 14 and 4 bits
        c, x = candidate(name), torch.ones(16, 32)
        stored = encode_blocks(x, c.format, granularity=c.granularity, **c.keywords)
        assert c.bits(16, 32) == stored.nbytes * 8 / x.numel()
    with pytest.raises(ValueError, match="empty"):
        report_weights("none.pt", [])
    with pytest.raises(TypeError):
        candidate(8)
    for names in ("E4M3", None):
        with pytest.raises(TypeError, match=f"candidates must be a list of formats, got {names!r}"):
            report_weights("none.pt", names)
    with pytest.raises(ValueError, match=r"candidates must have at most 16 bits, .* got TF32@row"):
        report_weights("none.pt", ["E4M3", "TF32@row"])


# Where the answer is known.


def best(x, names, tmp_path):
    torch.save({"x": x}, tmp_path / "x.pt")
    scores = report_weights(tmp_path / "x.pt", names).layers[0].scores
    return max(scores, key=lambda name: scores[name].sqnr)


EIGHT_BITS = ["E0M7", "E2M5", "E3M4", "E4M3", "E5M2", "MXFP8_E4M3"]


def test_known_answers(tmp_path):
    g = torch.Generator().manual_seed(0)
    uniform = torch.rand(256, 256, generator=g) * 2 - 1
    assert best(uniform, EIGHT_BITS, tmp_path) == "E0M7"
    sign = torch.randint(2, (256, 256), generator=g) * 2.0 - 1
    wide = sign * 2 ** (torch.rand(256, 256, generator=g) * 28)
    torch.save({"x": wide}, tmp_path / "x.pt")
    scores = report_weights(tmp_path / "x.pt", EIGHT_BITS).layers[0].scores
    assert min(EIGHT_BITS[:5], key=lambda name: scores[name].flushed) == "E5M2"
    outliers = torch.randn(256, 256, generator=g)
    outliers.view(-1)[torch.randint(outliers.numel(), (200,), generator=g)] *= 20
    assert best(outliers, ["E2M1", "E2M1@row", "MXFP4"], tmp_path) == "MXFP4"
