"""Whole models: each trains for some steps under each recipe, and coverage finds nothing left in high precision."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from altgrad.simulation import RECIPES, coverage, simulate


class BasicBlock(nn.Module):
    """The block of ResNet-18."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (h + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet18(nn.Module):
    """torchvision's resnet18, narrower: a 7 x 7 convolution, four stages of two blocks, a linear layer.

    Written out, since torchvision's wheels work with the CUDA build of torch alone.
    """

    def __init__(self, width=8, classes=10):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, channels = [], width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(BasicBlock(channels, width << stage, stride))
                channels = width << stage
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(channels, classes)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((-2, -1)))


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
@pytest.mark.parametrize("make, layers", [(ResNet18, 21), (Encoder, 10)], ids=["resnet18", "encoder"])
def test_trains_and_is_covered(make, layers, recipe):
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(8, 3, 32, 32), torch.arange(8)
    before = coverage(model, x)
    simulation = simulate(model, recipe, attention=True)
    assert len(simulation.states) == layers
    found = coverage(model, x)
    assert found.uncovered == [] and found.simulated == found.total
    # The gradient of the input is not asked for; a convolution's two gradients are one call of aten's, as attention is.
    assert found.total >= before.total
    losses = train(model, lambda model: F.cross_entropy(model(x), y), simulation)
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
