"""Whole models: each trains for some steps under each recipe, and coverage finds nothing left in high precision."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import name_operators_of_torchvision
from torch import nn
from torch.nn import functional as F

from altgrad.simulation import RECIPES, coverage, simulate

name_operators_of_torchvision()


def resnet18():
    return pytest.importorskip("torchvision").models.resnet18(num_classes=10)


class Encoder(nn.Module):
    """Torch's transformer layers over learned positions."""

    def __init__(self, width=32, classes=10):
        super().__init__()
        self.project, self.positions = nn.Linear(48, width), nn.Parameter(torch.zeros(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers, self.fc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, classes)

    def forward(self, x):
        patches = F.unfold(x, 4, stride=8).mT  # [batch, 16, 48]
        return self.fc(self.layers(self.project(patches) + self.positions).mean(1))


def gpt2():
    """transformers' GPT-2: its own Conv1D, and a head that shares the embedding's weight."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def llama():
    """transformers' Llama: rotary positions, a gated network, fewer heads of keys than of queries."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def train(model, loss_of, simulation, steps=6):
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        simulation.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make, layers, steps", [(resnet18, 21, 3), (Encoder, 10, 6)], ids=["resnet18", "encoder"])
def test_trains_and_is_covered(make, layers, steps, recipe):
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(8, 3, 32, 32), torch.arange(8)
    before = coverage(model, x)
    simulation = simulate(model, recipe, attention=True)
    assert len(simulation.states) == layers
    found = coverage(model, x)
    assert found.uncovered == [] and found.simulated == found.total
    # The gradient of the input is not asked for; a convolution's two gradients are one call of aten's, as attention is.
    assert found.total >= before.total
    losses = train(model, lambda model: F.cross_entropy(model(x), y), simulation, steps)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make, layers", [(gpt2, 9), (llama, 15)], ids=["gpt2", "llama"])
def test_language_models_train_and_only_attention_is_left(make, layers, recipe):
    """Models of transformers: every layer but the embeddings is switched; attention's products are functions there."""
    torch.manual_seed(0)
    model, tokens = make(), torch.randint(64, (2, 16))
    simulation = simulate(model, recipe)
    assert len(simulation.states) == layers
    found = coverage(model, tokens)
    names = {(row.direction, row.operation) for row in found.uncovered}
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert names == {("forward", attention), ("backward", f"{attention}_backward")}
    assert sum(row.times for row in found.uncovered) == 2 * 2  # of two blocks
    assert (found.simulated, found.total) == (3 * layers, 3 * layers + 4)
    losses = train(model, lambda model: model(tokens, labels=tokens).loss, simulation)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_digits(recipe, monkeypatch):
    """The layers and data of docs/examples/train_digits.py: some steps, and more than half of the test set is right."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "docs" / "examples")])
    import train_digits

    train_x, test_x, train_y, test_y = train_digits.digits()
    torch.manual_seed(0)
    model = nn.Sequential(*(part for layer in train_digits.Network(None).layers for part in (layer, nn.ReLU())))[:-1]
    simulation = simulate(model, recipe)
    assert len(simulation.states) == 3
    found = coverage(model, train_x[:128])
    assert found.uncovered == [] and found.total == 8  # nobody asks for the gradient of the images
    train(model, lambda model: F.cross_entropy(model(train_x[:512]), train_y[:512]), simulation, steps=40)
    with torch.no_grad():
        assert (model(test_x).argmax(1) == test_y).float().mean() > 0.5
