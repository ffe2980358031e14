"""Trains a small network on handwritten digits in float32 and in six 8-bit formats, each through torch.compile.

Weights and activations are quantized per tensor with the scale amax / max: the largest magnitude of the tensor lands on
the largest value of the format. The best format is then exported, saved, loaded by a fresh process that imports
ops_registry alone, and has to give the same bits.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from altgrad.quantization import (
    E0M7,
    E1M6,
    E3M4,
    E4M3,
    E5M2,
    E7M0,
    FP8Format,
    compute_scale,
    quantization_stats,
    quantize,
    sqnr,
)

FORMATS = [None, E0M7, E1M6, E3M4, E4M3, E5M2, E7M0]  # None is float32
EPOCHS, BATCH, LEARNING_RATE = 30, 128, 0.01

# Run by the fresh process: argv holds the paths of the program, of its input and of its output.
LOAD_AND_RUN = """
import sys, torch, ops_registry
program, x, y = sys.argv[1:]
torch.save(torch.export.load(program).module()(torch.load(x)), y)
"""


class Network(nn.Module):
    """64 pixels, two hidden layers, 10 classes; every weight and every layer's input is quantized."""

    def __init__(self, format: FP8Format | None) -> None:
        super().__init__()
        self.format = format
        self.layers = nn.ModuleList([nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 10)])

    def quantize(self, x: Tensor) -> Tensor:
        return x if self.format is None else quantize(x, self.format, compute_scale(x, self.format))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = F.linear(self.quantize(F.relu(x) if i else x), self.quantize(layer.weight), layer.bias)
        return x


def digits() -> list[Tensor]:
    """The images scaled to 0..1 and their labels: train_x, test_x, train_y, test_y."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    return [torch.tensor(part, dtype=torch.float32 if part.ndim == 2 else torch.int64) for part in split]


def train(format: FP8Format | None, x: Tensor, y: Tensor, backend: str) -> Network:
    """A network trained in a format; all formats start from the same weights and see the same batches."""
    torch.manual_seed(0)
    torch.compiler.reset()  # every format is a graph of its own, and there is a limit to graphs per function
    model = Network(format)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    start = time.perf_counter()
    for epoch in range(1, EPOCHS + 1):
        total, batches = 0.0, torch.randperm(len(x)).split(BATCH)[:-1]  # the last one is smaller: one graph less
        for batch in batches:
            loss = F.cross_entropy(compiled(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        if epoch == 1 or epoch % 10 == 0:
            seconds = time.perf_counter() - start
            print(f"  epoch {epoch:2} of {EPOCHS}: loss {total / len(batches):.4f} ({seconds:.1f} s)", flush=True)
    return model


@torch.no_grad()
def measure(model: Network, x: Tensor, y: Tensor) -> tuple[float, ...]:
    """Test accuracy, shares of the weights clipped and flushed to zero, SQNR of the weights in dB."""
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    if model.format is None:
        return accuracy, 0.0, 0.0, float("inf")
    weights = [layer.weight for layer in model.layers]
    stats = [quantization_stats(w, model.format, compute_scale(w, model.format)) for w in weights]
    size = sum(w.numel() for w in weights)
    clipped, flushed = (
        sum(share.item() * w.numel() for share, w in zip(shares, weights, strict=True)) / size
        for shares in ([s.clipped for s in stats], [s.flushed for s in stats])
    )
    signal, noisy = (torch.cat([w.flatten() for w in ws]) for ws in (weights, map(model.quantize, weights)))
    return accuracy, clipped, flushed, sqnr(signal, noisy).item()


def check_export(model: Network, x: Tensor) -> None:
    """Exports with a dynamic batch, saves, loads in a fresh process and compares the bits of the output."""
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    nodes = sum(node.target is torch.ops.altgrad.quantize.default for node in program.graph.nodes)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("digits.pt2", "x.pt", "y.pt")]
        torch.export.save(program, paths[0])
        torch.save(x, paths[1])
        subprocess.run([sys.executable, "-c", LOAD_AND_RUN, *paths], check=True)
        same = torch.equal(torch.load(paths[2]).view(torch.int32), model(x).view(torch.int32))
    print(f"\nExported with {nodes} altgrad.quantize nodes, saved, loaded in a fresh process: ", end="")
    print("the same bits." if same else "OTHER BITS.")
    if not same:
        sys.exit(1)


def main() -> None:
    torch.set_num_threads(1)  # the network is too small to share
    train_x, test_x, train_y, test_y = digits()
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    backend = "inductor" if shutil.which(compiler) else "aot_eager"
    if backend == "aot_eager":
        print(f"No C++ compiler ({compiler}): torch.compile runs with backend aot_eager, without generated code.")
    results = {}
    for format in FORMATS:
        name = format.name if format else "float32"
        print(f"{name}: compiling and training", flush=True)
        model = train(format, train_x, train_y, backend)
        results[name] = (model, measure(model, test_x, test_y))

    print("\nformat    accuracy   clipped   flushed to zero   SQNR of weights")
    for name, (_, (accuracy, clipped, flushed, ratio)) in results.items():
        print(f"{name:<8} {accuracy:9.2%} {clipped:9.2%} {flushed:17.2%} {ratio:14.1f} dB")

    quantized = [result for name, result in results.items() if name != "float32"]
    best, _ = max(quantized, key=lambda result: (result[1][0], result[1][3]))
    print(f"\nBest quantized format: {best.format.name}")
    check_export(best, test_x)


if __name__ == "__main__":
    main()
