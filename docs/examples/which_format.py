"""Which format suits my model? Trains a small transformer, then quantizes the weights of every Linear in every format.

The model learns to add two numbers, written in digits. Each format is tried with one scale a tensor and with one scale
for every 32 elements of a row; the signal-to-quantization-noise ratio of every layer is drawn as a picture, and the
loss of the quantized model on sums it has not seen says what the noise means.

    python docs/examples/which_format.py [steps of training] [picture]
"""

import copy
import sys
import time
from pathlib import Path
from statistics import mean

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.quantization import FORMAT_REGISTRY, FP8Format, PerBlock, PerTensor, quantize_blocks, sqnr

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FORMATS = [f for f in FORMAT_REGISTRY.values() if f.has_negative_zero]  # the two others are like E4M3 and E5M2
GRANULARITIES = {"one scale a tensor": PerTensor(), "one scale for 32 elements": PerBlock(32)}
DIGITS, WIDTH, LAYERS, BATCH = 2, 64, 4, 128
CHARACTERS = "0123456789+="
Results = dict[str, dict[str, tuple[list[float], float]]]


def lines_of(pairs: Tensor) -> Tensor:
    """Pair a * 10^DIGITS + b as the line a+b=sum, the sum's digits last to first, as one adds. (count, length)"""
    lines = []
    for a, b in (divmod(pair, 10**DIGITS) for pair in pairs.tolist()):
        lines.append(f"{a:0{DIGITS}}+{b:0{DIGITS}}={f'{a + b:0{DIGITS + 1}}'[::-1]}")
    return torch.tensor([[CHARACTERS.index(character) for character in line] for line in lines])


class Block(nn.Module):
    """Attention and a two-layer network, each behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(len(CHARACTERS), WIDTH)
        self.position = nn.Embedding(4 * DIGITS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CHARACTERS))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, lines: Tensor) -> Tensor:
        """Cross entropy of the digits of the sums, in nats."""
        answer = slice(2 * DIGITS + 1, None)
        return F.cross_entropy(self(lines[:, :-1])[:, answer].flatten(0, 1), lines[:, 1:][:, answer].flatten())


def train(lines: Tensor, steps: int) -> Transformer:
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = model.loss(lines[torch.randint(len(lines), (BATCH,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"  step {step}: loss {loss.item():.4f} ({time.perf_counter() - start:.0f} s)", flush=True)
    return model


@torch.no_grad()
def quantized(
    model: Transformer, format: FP8Format, granularity: PerTensor | PerBlock
) -> tuple[Transformer, list[float]]:
    """The model with the weight of every Linear quantized, and the SQNR of each in dB."""
    model, ratios = copy.deepcopy(model), []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.clone()
            layer.weight.copy_(quantize_blocks(weight, format, granularity=granularity))
            ratios.append(sqnr(weight, layer.weight).item())
    return model, ratios


def draw(results: Results, layers: list[str], path: str) -> None:
    """A map of SQNR, layers by formats, for every granularity."""
    figure, panels = plt.subplots(1, len(results), figsize=(15, 7), sharey=True, layout="constrained")
    for panel, (title, by_format) in zip(panels, results.items()):
        values = [[by_format[f.name][0][i] for f in FORMATS] for i in range(len(layers))]
        image = panel.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=50)
        panel.set_title(title)
        names = [f"{f.name}\n{f.bits} bit\n{by_format[f.name][1]:.4f}" for f in FORMATS]
        panel.set_xticks(range(len(FORMATS)), names, fontsize=8)
        panel.set_yticks(range(len(layers)), layers, fontsize=8)
        panel.set_xlabel("format, its width, and the loss of the quantized model")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                panel.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="w" if value < 30 else "k")
    figure.colorbar(image, ax=panels, label="SQNR of the weights, dB")
    figure.savefig(path, dpi=80)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 800
    path = sys.argv[2] if len(sys.argv) > 2 else str(Path(__file__).parents[1] / "which_format.png")
    torch.set_num_threads(1)  # the layers are too small for more
    torch.manual_seed(0)
    unseen, seen = lines_of(torch.randperm(10 ** (2 * DIGITS))).tensor_split([1000])
    model = train(seen, steps)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    results: Results = {}
    for title, granularity in GRANULARITIES.items():
        results[title] = {}
        for f in FORMATS:
            small, ratios = quantized(model, f, granularity)
            with torch.no_grad():
                results[title][f.name] = ratios, small.loss(unseen).item()
    draw(results, layers, path)

    with torch.no_grad():
        print(f"loss on unseen sums in float32: {model.loss(unseen).item():.4f}\n")
    print("| format | bits | " + " | ".join(f"{title}: mean SQNR, loss" for title in results) + " |")
    print("|---|---|" + "---|" * len(results))
    for f in FORMATS:
        cells = [f"{mean(ratios):.1f} dB, {loss:.4f}" for ratios, loss in (r[f.name] for r in results.values())]
        print(f"| {f.name} | {f.bits} | {' | '.join(cells)} |")
    print("\nthe least noise in the weights:")
    for bits in sorted({f.bits for f in FORMATS}, reverse=True):
        for title, by_format in results.items():
            best = max((f.name for f in FORMATS if f.bits == bits), key=lambda name: mean(by_format[name][0]))
            print(f"  {bits} bits, {title}: {best}")
    print(f"\nthe picture is {path}")


if __name__ == "__main__":
    main()
