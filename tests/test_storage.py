"""altgrad.storage: a file gives back quantize_blocks of what was saved, bit for bit, or an error that says why."""

import json
import math

import pytest
import torch
from conftest import DTYPES, assert_same_bits
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from altgrad.quantization import (
    E3M2,
    MXFP4,
    MXFP6_E3M2,
    NVFP4,
    Blocks,
    PerAxis,
    PerBlock,
    PerTensor,
    decode_blocks,
    encode_blocks,
    quantize_blocks,
)

pytest.importorskip("safetensors", reason="safetensors is not installed")
from safetensors.torch import load_file, safe_open, save_file

from altgrad import storage

GRANULARITIES = [PerTensor(), PerAxis(0), PerAxis((0, 1)), PerBlock(7), PerBlock((2, 3)), PerBlock({0: 4, -1: 5})]


class Model(nn.Module):
    """Tied weights, a bias, a norm, a counter and a buffer of two dimensions."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.body, self.head = (
            nn.Embedding(20, 48), nn.BatchNorm1d(48), nn.Linear(48, 48), nn.Linear(48, 20),
        )  # fmt: skip
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3, 4, dtype=torch.bool))
        self.register_buffer("table", torch.randn(4, 33, dtype=torch.bfloat16))

    def forward(self, i):
        return self.head(self.body(self.norm(self.embed(i))))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def content(path):
    """Tensors and metadata, as safetensors reads them."""
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["altgrad"])


@pytest.mark.parametrize("options", [MXFP4, MXFP6_E3M2, NVFP4], ids=["MXFP4", "MXFP6", "NVFP4"])
def test_a_model_is_its_quantized_weights(path, options):
    model = Model()
    storage.save(model, path, options)
    state, loaded = model.state_dict(), storage.load(path)
    assert list(loaded) == list(state)
    for name, want in state.items():
        is_weight = want.ndim > 1 and want.is_floating_point()
        assert_same_bits(loaded[name], quantize_blocks(want, **options) if is_weight else want)
    other = Model()
    other.load_state_dict(loaded)
    model.load_state_dict(loaded)
    i = torch.arange(8)
    assert_same_bits(other.eval()(i), model.eval()(i))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_blocks_come_back(path, granularity):
    """Every field, for every dtype, with specials."""
    given = {}
    for dtype in DTYPES:
        x = torch.randn(8, 15).to(dtype)
        x[2, 3] = math.nan
        given[str(dtype)] = encode_blocks(x, E3M2, granularity=granularity, rounding="toward_zero")
    given["powers"] = encode_blocks(torch.randn(8, 15), "e4m3b11fnuz", granularity=granularity, power_of_two="ceil")
    storage.save(given, path)
    loaded = storage.load(path, decode=False)
    decoded = storage.load(path)
    for name, blocks in given.items():
        assert isinstance(loaded[name], Blocks) and loaded[name][3:] == blocks[3:]
        for got, want in zip(loaded[name][:3], blocks[:3]):
            assert (got is None) == (want is None)
            if want is not None:
                assert_same_bits(got, want)
        assert_same_bits(decoded[name], decode_blocks(blocks))
    storage.save(loaded, path.with_name("again"))
    assert path.with_name("again").read_bytes() == path.read_bytes()


def test_bits_and_names_in_the_file(path):
    state = {"w": torch.randn(64, 128), "b": torch.randn(64), "i": torch.arange(6).view(2, 3)}
    storage.save(state, path, NVFP4)
    tensors, metadata = content(path)
    assert {name: t.nbytes for name, t in tensors.items()} == {
        "w.codes": 4096, "w.scales": 512, "w.tensor_scale": 4, "b": 256, "i": 48,
    }  # fmt: skip
    assert metadata["tensors"] == {
        "w": {
            "format": "E2M1", "scale_format": "E4M3", "has_tensor_scale": True, "granularity": {"PerBlock": {"-1": 16}},
            "n": 128, "dtype": "float32",
        },
        "b": None,
        "i": None,
    }  # fmt: skip


def test_patterns(path):
    model = Model()
    formats = {"embed.*": None, "head.*": None, "body.*": NVFP4, "*": MXFP4 | {"granularity": PerBlock({0: 4})}}
    storage.save(model, path, formats)
    stored = storage.load(path, decode=False)
    assert {name: b.granularity for name, b in stored.items() if isinstance(b, Blocks)} == {
        "body.weight": PerBlock(16), "table": PerBlock({0: 4}),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"pattern 'bod' matches no weight: .*body\.weight"):
        storage.save(model, path, {"bod": MXFP4})


def test_what_is_not_finite_stays_as_it_is(path):
    """A causal mask and a weight with one NaN; their blocks would be NaN."""
    model = nn.Linear(32, 32)
    model.register_buffer("mask", torch.full((32, 32), -math.inf).triu(1))
    state = model.state_dict() | {"nan": torch.randn(4, 32)}
    state["nan"][1, 2] = math.nan
    for formats in (NVFP4, {"mask": NVFP4, "*": NVFP4}):
        storage.save(state, path, formats)
        loaded = storage.load(path)
        for name, want in state.items():
            assert_same_bits(loaded[name], quantize_blocks(want, **NVFP4) if name == "weight" else want)


def test_tied_tensors_are_written_once(path):
    model = Model()
    storage.save(model, path, MXFP4)
    tensors, metadata = content(path)
    assert metadata["tensors"]["head.weight"] == "embed.weight"
    assert not [name for name in tensors if name.startswith("head.weight")]
    for decode in (True, False):
        loaded = storage.load(path, decode=decode)
        assert loaded["head.weight"] is loaded["embed.weight"]
    with pytest.raises(ValueError, match=r"embed\.weight and head\.weight are tied"):
        storage.save(model, path, {"head.*": NVFP4})
    storage.save(model, path, {"embed.*": MXFP4, "head.*": MXFP4})


def test_views_of_one_memory(path):
    """What overlaps without being the same is written twice; what is strided or transposed becomes dense."""
    x = torch.randn(6, 8)
    state = {"x": x, "flat": x.view(-1), "rows": x[1:3], "columns": x[:, ::2], "t": x.t(), "empty": x[:0], "e2": x[:0]}
    storage.save(state, path)
    loaded = storage.load(path)
    for name, want in state.items():
        assert_same_bits(loaded[name], want.contiguous())
    assert loaded["empty"] is not loaded["e2"]


def test_what_shares_memory_and_is_another(path):
    """Blocks of the same codes with other scales or fields, codes alone, and what is conjugated or negated lazily."""
    blocks, z = encode_blocks(torch.randn(4, 32), **MXFP4), torch.randn(4, 32, dtype=torch.complex64)
    given = {
        "codes": blocks.codes, "blocks": blocks, "scales": blocks._replace(scales=blocks.scales + 1),
        "dtype": blocks._replace(dtype=torch.bfloat16), "codes again": blocks.codes, "again": blocks._replace(),
        "z": z, "conjugate": z.conj(), "imag": z.imag, "negative": z.conj().imag, "z again": z, "other": z.mT.conj(),
    }  # fmt: skip
    for state in (given, dict(reversed(given.items()))):
        storage.save(state, path)
        loaded = storage.load(path, decode=False)
        for name, want in state.items():
            assert type(loaded[name]) is type(want)
            if isinstance(want, Blocks):
                assert loaded[name][2:] == want[2:]
                assert all(map(torch.equal, loaded[name][:2], want[:2]))
            else:
                assert loaded[name].equal(want)
        for name in ("codes", "z"):
            assert loaded[f"{name} again"] is loaded[name]
        assert loaded["again"] is loaded["blocks"]
    storage.save({"negative": z.conj().imag}, path, MXFP4)
    assert_same_bits(storage.load(path)["negative"], quantize_blocks(-z.imag, **MXFP4))


def refused(path, error, match, state, formats=None):
    """The save fails and leaves what was there as it was, and nothing beside it."""
    storage.save({"w": torch.ones(2, 2)}, path)
    before = path.read_bytes()
    with pytest.raises(error, match=match):
        storage.save(state, path, formats)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_is_not_saved(path, monkeypatch):
    w = torch.ones(4, 4)
    refused(path, TypeError, "w must be a plain tensor, got a TwoTensor", {"w": TwoTensor(w, w)})
    refused(path, TypeError, "step must be a tensor or Blocks, got int 3", {"w": w, "step": 3})
    refused(path, TypeError, r"w must be .* device meta", {"w": w.to("meta")})
    refused(path, TypeError, r"w must be .* layout torch.sparse_coo", {"w": w.to_sparse()})
    refused(path, ValueError, "two tensors would be called 'w.codes'", {"w": w, "w.codes": w[0]}, MXFP4)
    refused(path, ValueError, "keeps the name '__metadata__' for itself", {"__metadata__": w})
    refused(path, TypeError, "safetensors has no torch.complex128, .* dtype of w", {"w": w.to(torch.complex128)})
    refused(path, TypeError, "formats must be a BlockFormat or a mapping .* got 'MXFP4'", {"w": w}, "MXFP4")
    refused(path, TypeError, "the format of pattern 'format' must be a BlockFormat", {"w": w}, {"format": "E4M3"})
    refused(path, TypeError, "unexpected keyword argument 'metod'", {"w": w}, {"*": MXFP4 | {"metod": "mse"}})
    refused(path, TypeError, "model must be a module or a state dict, got int", 3)
    refused(path, TypeError, "names must be strings, got 1", {1: w})
    refused(path, ValueError, r"names must be text in UTF-8, .* got '\\udc80'", {"\udc80": w})
    with pytest.raises(ValueError, match=r"path must be text in UTF-8, .* got '.*\\udcff'"):
        storage.save({"w": w}, path.with_name("\udcff"))
    with pytest.raises(ValueError, match="device must be one that holds data, got meta"):
        storage.load(path, device="meta")
    refused(path, ValueError, "at most 8 bits", {"w": w}, {"format": "FP16", "granularity": PerBlock(4)})

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        storage.save({"w": w}, path)
    assert list(path.parent.iterdir()) == [path] and storage.load(path)["w"].equal(torch.ones(2, 2))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="cannot be written"):
        storage.save({"w": torch.ones(2)}, tmp_path / "no" / "such.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        storage.load(tmp_path / "none.safetensors")


def test_truncated_files(path):
    storage.save(Model(), path, MXFP4)
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, *range(200, len(whole), 397), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file, or truncated"):
            storage.load(path)


def test_foreign_files(path):
    path.write_bytes(b"PK\x03\x04 not what it is called" * 9)
    with pytest.raises(ValueError, match="not a safetensors file"):
        storage.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"not written by altgrad\.storage\.save"):
        storage.load(path)


def test_missing_and_unexpected_tensors(path):
    storage.save({"w": torch.randn(4, 32), "b": torch.randn(4)}, path, NVFP4)
    tensors, metadata = content(path)
    metadata = {"altgrad": json.dumps(metadata)}
    for name in tensors:
        save_file({key: t for key, t in tensors.items() if key != name}, path, metadata)
        with pytest.raises(ValueError, match=rf"model\.safetensors: missing tensors: {name}$"):
            storage.load(path)
    save_file({"b": tensors["b"]}, path, metadata)
    with pytest.raises(ValueError, match=r"missing tensors: w\.codes, w\.scales, w\.tensor_scale$"):
        storage.load(path, decode=False)
    save_file(tensors | {"c": torch.ones(1)}, path, metadata)
    with pytest.raises(ValueError, match=r"unexpected tensors: c$"):
        storage.load(path)


@pytest.mark.parametrize("decode", [True, False])
def test_tensors_that_do_not_fit(path, decode):
    storage.save({"w": torch.randn(4, 64)}, path, MXFP4)
    tensors, metadata = content(path)
    metadata = {"altgrad": json.dumps(metadata)}
    codes, scales = tensors["w.codes"], tensors["w.scales"]
    for change in (
        {"w.codes": codes[:, :-1]}, {"w.codes": codes.short()}, {"w.scales": scales[:3]}, {"w.scales": scales.float()},
    ):  # fmt: skip
        save_file({key: t.contiguous() for key, t in (tensors | change).items()}, path, metadata)
        with pytest.raises(ValueError, match=r"model\.safetensors: the tensors of w do not fit together: \w+ must"):
            storage.load(path, decode=decode)


def test_damaged_metadata(path):
    storage.save({"w": torch.randn(4, 64)}, path, MXFP4)
    tensors, metadata = content(path)
    fields = metadata["tensors"]["w"]
    damaged = [fields | {key: value} for key in fields for value in (None, "x", 3) if key != "scale_format"]
    damaged = [entry for entry in damaged if entry not in (fields, fields | {"has_tensor_scale": None})]
    damaged += [{key: value for key, value in fields.items() if key != left_out} for left_out in fields]
    texts = [json.dumps(metadata | {"tensors": {"w": entry}}) for entry in damaged]
    texts += ["", "{", "[]", "{}", json.dumps(metadata | {"version": 2}), json.dumps(metadata | {"tensors": 5})]
    texts += [json.dumps(metadata | {"tensors": {"w": fields, "v": name}}) for name in ("u", "v")]
    for text in texts:
        save_file(tensors, path, {"altgrad": text})
        with pytest.raises(ValueError, match=r"model\.safetensors: "):
            storage.load(path)


def test_gradients_and_devices_are_left_behind(path):
    w = nn.Parameter(torch.randn(4, 32))
    storage.save({"w": w}, path, MXFP4)
    assert not storage.load(path)["w"].requires_grad
    assert storage.load(path, device=torch.device("cpu"), decode=False)["w"].codes.device.type == "cpu"
