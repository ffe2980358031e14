"""The examples of docs/storage.md: an optimizer whose state is codes, and a cache in MXFP8."""

import io
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits
from torch.nn.functional import scaled_dot_product_attention

from altgrad.quantization import quantize_blocks, sqnr

sys.path.append(str(Path(__file__).parent.parent / "docs" / "examples"))
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
import block_adam
import kv_cache


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_adam_of_codes_is_as_good_as_adam_in_float32():
    accuracies = {
        name: sum(block_adam.accuracy(block_adam.train(make, 12, seed)[0]) for seed in range(3)) / 3
        for name, make in block_adam.OPTIMIZERS.items()
    }
    assert accuracies["BlockAdam"] >= accuracies["torch.optim.Adam"] - 0.01, accuracies
    assert accuracies["BlockAdam"] > 0.95


def test_its_state_is_codes_before_and_after_a_reload():
    make = block_adam.OPTIMIZERS["BlockAdam"]
    model, optimizer = block_adam.train(make, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = make(model.parameters())
    other.load_state_dict(torch.load(file, weights_only=True))
    for p, state in optimizer.state.items():
        assert {key: getattr(value, "dtype", int) for key, value in state.items()} == {
            "step": int, "exp_avg": torch.uint8, "exp_avg_scale": torch.float32,
            "exp_avg_sq": torch.uint8, "exp_avg_sq_scale": torch.float32,
        }  # fmt: skip
        assert state["exp_avg_sq_scale"].numel() == -(-p.numel() // 128)
        for key, value in state.items():
            loaded = other.state[p][key]
            assert loaded == value if key == "step" else loaded.equal(value)
    assert block_adam.bytes_a_parameter(other) < 2.1


def test_a_reload_changes_no_bit():
    models = [block_adam.train(block_adam.OPTIMIZERS["BlockAdam"], 4, reloads=reloads)[0] for reloads in (True, False)]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_through_the_cache(dtype):
    """Token by token it gives what quantized keys and values of the whole give."""
    shape = 2, 3, 40, 64
    queries, keys, values = (torch.randn(shape, dtype=dtype) for _ in range(3))
    cache = kv_cache.KVCache(*shape, dtype=dtype)
    got = kv_cache.generate(cache, queries, keys, values, prompt=20)
    assert cache.tokens == 40 and cache.nbytes * 8 == 8.25 * 2 * keys.numel()
    stored = [quantize_blocks(x, **cache.format) for x in (keys, values)]
    for got_x, want in zip(cache.read(), stored, strict=True):
        assert_same_bits(got_x, want)
    want = [
        scaled_dot_product_attention(queries[..., i : i + 1, :], *(x[..., : i + 1, :] for x in stored))
        for i in range(20, 40)
    ]
    assert_same_bits(got, torch.cat(want, -2))
    exact = scaled_dot_product_attention(queries[..., -1:, :], keys, values)
    assert sqnr(exact, got[..., -1:, :]) > 20


def test_the_examples_print_what_docs_show(capsys):
    kv_cache.main(tokens=48, prompt=40)
    assert "8.25 bits an element" in (printed := capsys.readouterr().out) and "quantize_blocks: True" in printed
    block_adam.main(epochs=1, seeds=1)
    assert "| BlockAdam |" in capsys.readouterr().out
