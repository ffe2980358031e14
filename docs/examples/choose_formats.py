"""A recipe for each layer at five bits a weight, beside one five-bit format for all layers.

Three models are trained: a network for handwritten digits, a residual network of ResNet-18's blocks for the same, and
a small GPT on the standard library's sources. Each is measured on four batches; :func:`altgrad.report.assign` chooses
the candidates of its layers within the bits that the five-bit formats take, and the loss on other data says what that
is worth.

    python docs/examples/choose_formats.py [folder for the reports]
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent))
import train_digits
import train_gpt

from altgrad.report import DEFAULT, assign, candidate, measure, write
from altgrad.report.assign import simulated_loss
from altgrad.simulation import Recipe, restore, simulate

FIVE_BITS = ["e1m3b0f", "e2m2b1f", "e3m1b3f"]
CANDIDATES = [*DEFAULT, *FIVE_BITS, *(f"{name}@row" for name in ("E2M1", "e1m3b0f", "e2m2b1f", "E2M3", "E3M4"))]
Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


@torch.no_grad()
def divergence(model: nn.Module, recipes: dict[str, Recipe], batches: list[Batch]) -> float:
    """The mean Kullback-Leibler divergence of the outputs from those of the weights in high precision, in nats."""
    before = [model(x).log_softmax(-1).flatten(0, -2) for x, _ in batches]
    simulate(model, recipes)
    after = [model(x).log_softmax(-1).flatten(0, -2) for x, _ in batches]
    restore(model)
    pairs = zip(after, before)
    return sum(F.kl_div(q, p, log_target=True, reduction="batchmean").item() for q, p in pairs) / len(batches)


def fit(model: nn.Module, batch_of: Callable[[], Batch], steps: int, learning_rate: float) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch_of()).backward()
        optimizer.step()
    return model.eval()


class Residual(nn.Module):
    """ResNet-18's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def residual_network() -> nn.Module:
    """ResNet-18's eight blocks, narrow, for images of 8 x 8."""
    widths = [16, 16, 16, 32, 32, 64, 64, 64, 64]
    strides = [1, 1, 2, 1, 2, 1, 1, 1]
    blocks = [Residual(*pair, stride) for pair, stride in zip(pairwise(widths), strides)]
    stem = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def models() -> dict[str, tuple[nn.Module, list[Batch], list[Batch]]]:
    """Trained models, batches to measure them on, and others to test them on."""
    train_x, test_x, train_y, test_y = train_digits.digits()
    generator = torch.Generator().manual_seed(0)

    def digits() -> Batch:
        index = torch.randint(len(train_x), (128,), generator=generator)
        return train_x[index], train_y[index]

    preset = replace(train_gpt.PRESETS["cpu"], width=64, depth=2, context=64)
    train_text, test_text = train_gpt.read_sources()

    def text(source: Tensor = train_text) -> Batch:
        return train_gpt.batch_of(source, preset, generator)

    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    test = [(test_x, test_y)]
    return {
        "digits": (fit(mlp, digits, 300, 3e-3), [digits() for _ in range(4)], test),
        "residual": (fit(residual_network(), digits, 150, 2e-3), [digits() for _ in range(4)], test),
        "gpt": (
            fit(train_gpt.GPT(preset), text, 200, 3e-3),
            [text() for _ in range(4)],
            [text(test_text) for _ in range(8)],
        ),
    }


def main() -> None:
    for name, (model, batches, test) in models().items():
        report = measure(model, batches, loss, CANDIDATES)
        weights = [layer for layer in report.layers if layer.operand == "forward.w"]
        total = sum(layer.count for layer in weights)
        budget = sum(layer.count * layer.scores[FIVE_BITS[0]].bits for layer in weights) / total
        choice = assign(report, budget, model=model)
        with torch.no_grad():
            before = sum(loss(model, batch).item() for batch in test) / len(test)
        print(f"{name}: {len(weights)} layers, {total} weights, test loss {before:.4f}")
        counts = Counter(operands["forward.w"] for operands in choice.choices.values())
        rows = {format: ({x.name: candidate(format).recipe() for x in weights}, budget) for format in FIVE_BITS}
        rows["assigned"] = choice.recipes, choice.bits["weights"]
        for row, (recipes, bits) in rows.items():
            change = simulated_loss(model, recipes, test, loss) - before
            print(f"  {row:10} {bits:.3f} bits  divergence {divergence(model, recipes, test):.2e}  loss {change:+.4f}")
        print(f"  assigned: {dict(counts)}")
        assert choice.predicted is not None and report.loss is not None
        grown = simulated_loss(model, choice.recipes, batches, loss) - report.loss
        print(f"  on the batches measured: predicted {choice.predicted - report.loss:+.5f}, is {grown:+.5f}")
        if len(sys.argv) > 1:
            folder = Path(sys.argv[1]) / name
            folder.mkdir(parents=True, exist_ok=True)
            write(report, folder, choice)


if __name__ == "__main__":
    main()
