"""Trains a small GPT on the sources of Python's standard library, in high precision and in simulated small formats.

    python docs/examples/train_gpt.py                    # a few minutes on two cores
    python docs/examples/train_gpt.py --preset gpu       # 25 million parameters, for one large GPU

Every run starts from the same weights and sees the same bytes in the same order. The curves are written to
train_gpt.json and drawn to train_gpt.png, which ``--draw train_gpt.json`` does alone. Layers are what the recipe's
authors leave them: the output layer is never simulated, and NVFP4 spares the last block too; ``fp4_nearest`` is FP4 as
one would first try it, in all blocks, rounded to nearest.
"""

import argparse
import json
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad.simulation import RECIPES, Recipe, Rule, Simulation, disabled, simulate

FP4 = Rule("E2M1", per=16, scale_format="E4M3")
HOPPER = ("HOPPER_FP8_FAST", "HOPPER_FP8", "HOPPER_FP8")
CHOICES = {
    "baseline": None,
    **RECIPES,
    "fp4_nearest": Recipe("fp4_nearest", (FP4, FP4), (FP4, FP4), (FP4, FP4)),
    "fp8_hopper": replace(RECIPES["fp8_current"], name="fp8_hopper", accumulator=HOPPER),
}
DEFAULT = ["baseline", "fp8_current", "mxfp8", "nvfp4", "fp4_nearest"]


@dataclass(frozen=True)
class Preset:
    width: int
    depth: int
    heads: int
    context: int
    batch: int
    steps: int
    learning_rate: float


PRESETS = {
    "cpu": Preset(width=96, depth=3, heads=4, context=128, batch=16, steps=250, learning_rate=2e-3),
    "gpu": Preset(width=512, depth=8, heads=8, context=512, batch=64, steps=3000, learning_rate=1e-3),
}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, p: Preset) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, p.width), nn.Parameter(torch.zeros(p.context, p.width))
        self.blocks = nn.ModuleList(Block(p.width, p.heads) for _ in range(p.depth))
        self.norm, self.head = nn.LayerNorm(p.width), nn.Linear(p.width, 256, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                scale = (2 * p.depth) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(weight, std=0.02 * scale)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read_sources() -> tuple[Tensor, Tensor]:
    """The standard library's Python sources as bytes: nine files of ten to train on, the others to test."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(folder.rglob("*.py")) if "site-packages" not in path.parts]
    texts = [b"".join(path.read_bytes() for i, path in enumerate(files) if (i % 10 == 0) == test) for test in (0, 1)]
    train, test = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)
    return train, test


def batch_of(text: Tensor, p: Preset, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random stretches of text, and the same one byte later."""
    starts = torch.randint(len(text) - p.context - 1, (p.batch, 1), generator=generator)
    stretch = text[(starts + torch.arange(p.context + 1)).to(text.device)].long()
    return stretch[:, :-1], stretch[:, 1:]


def loss_of(model: GPT, text: Tensor, p: Preset, generator: torch.Generator) -> Tensor:
    x, y = batch_of(text, p, generator)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


@torch.no_grad()
def test_loss(model: GPT, text: Tensor, p: Preset) -> float:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([loss_of(model, text, p, generator) for _ in range(20)]).mean().item()


def make(name: str, p: Preset, device: torch.device) -> tuple[GPT, Simulation | None]:
    """The model of a run, simulated, and compiled block by block on a GPU."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = GPT(p).to(device)
    recipe, simulation = CHOICES[name], None
    if recipe is not None:
        spared = [f"blocks.{p.depth - 1}.*"] if name == "nvfp4" else []
        simulation = simulate(model, recipe, skip=["head", *spared])
    if device.type == "cuda":
        for block in model.blocks:
            block.compile()
    return model, simulation


def make_optimizer(model: GPT, p: Preset) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.SequentialLR]:
    optimizer = torch.optim.AdamW(model.parameters(), p.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(min(100, p.steps // 10), 1)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, p.steps - warmup, p.learning_rate / 10)
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])


def train(name: str, p: Preset, train_text: Tensor, test_text: Tensor) -> dict[str, Any]:
    """One run: the losses of all steps, and the loss on other files in the end."""
    model, simulation = make(name, p, train_text.device)
    optimizer, schedule = make_optimizer(model, p)
    generator = torch.Generator().manual_seed(0)
    losses, pending = [], []
    start = last = time.perf_counter()
    for step in range(1, p.steps + 1):
        loss = loss_of(model, train_text, p, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if simulation is not None:
            simulation.step()
        pending.append(loss.detach())
        if step in (1, 10) or step % max(p.steps // 10, 1) == 0:
            new, now = torch.stack(pending).tolist(), time.perf_counter()
            rate = len(new) * p.batch * p.context / (now - last)
            print(f"  step {step:5} of {p.steps}: loss {sum(new) / len(new):.4f}, {rate:9,.0f} tokens/s", flush=True)
            losses, pending, last = losses + new, [], now
    result = {"losses": losses, "seconds": time.perf_counter() - start, "test": test_loss(model, test_text, p)}
    if simulation is not None:
        with disabled(model):
            result["test in high precision"] = test_loss(model, test_text, p)
    return result


def draw(curves: dict[str, dict], tokens_per_step: int, path: Path) -> None:
    """The losses, smoothed, and their distance from the baseline's."""
    import matplotlib.pyplot as plt
    import numpy as np

    def smooth(losses: list[float]) -> np.ndarray:
        width = max(len(losses) // 50, 1)
        return np.convolve(losses, np.ones(width) / width, "valid")

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for name, curve in curves.items():
        y = smooth(curve["losses"])
        x = (np.arange(len(y)) + len(curve["losses"]) - len(y)) * tokens_per_step / 1e6
        axes[0].plot(x, y, label=f"{name}: {curve['test']:.4f}", linewidth=1)
        if "baseline" in curves:
            n = min(len(y), len(base := smooth(curves["baseline"]["losses"])))
            axes[1].plot(x[:n], y[:n] - base[:n], linewidth=1)
    axes[0].set(xlabel="million bytes", ylabel="loss (nats a byte)", ylim=(None, smooth(curve["losses"]).min() + 1.5))
    axes[0].legend(title="loss on other files")
    axes[1].set(xlabel="million bytes", ylabel="loss above the baseline's")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--recipes", nargs="+", choices=CHOICES, default=DEFAULT)
    parser.add_argument("--steps", type=int, help="other than the preset's")
    parser.add_argument("--out", type=Path, default=Path("train_gpt.json"))
    parser.add_argument("--draw", type=Path, help="draw the curves of a file and train nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        saved = json.loads(arguments.draw.read_text())
        draw(saved["curves"], saved["tokens_per_step"], arguments.draw.with_suffix(".png"))
        return
    preset = PRESETS[arguments.preset]
    if arguments.steps:
        preset = Preset(**{**vars(preset), "steps": arguments.steps})
    device = "cuda" if arguments.preset == "gpu" else "cpu"
    train_text, test_text = (text.to(device) for text in read_sources())
    parameters = sum(p.numel() for p in GPT(preset).parameters())
    print(f"{len(train_text):,} bytes of Python, {parameters:,} parameters, {preset}")
    curves: dict[str, dict] = {}
    for name in arguments.recipes:
        print(name, flush=True)
        curves[name] = train(name, preset, train_text, test_text)
        saved = {"curves": curves, "tokens_per_step": preset.batch * preset.context, "preset": vars(preset)}
        arguments.out.write_text(json.dumps(saved))
    print("\nrecipe            last loss   on other files   the same weights in high precision   seconds")
    for name, curve in curves.items():
        n = max(len(curve["losses"]) // 20, 1)
        last = sum(curve["losses"][-n:]) / n
        high = curve.get("test in high precision", curve["test"])
        print(f"{name:16} {last:10.4f} {curve['test']:16.4f} {high:37.4f} {curve['seconds']:9.1f}")
    try:
        draw(curves, preset.batch * preset.context, arguments.out.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"No picture: {error}")


if __name__ == "__main__":
    main()
