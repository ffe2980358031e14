"""What simulated training costs: a step of GPT-2 small beside bfloat16, compiled block by block and eager.

    python tests/benchmarks/simulation.py [--device cuda] [--recipes fp8_current mxfp8 nvfp4] [--modes compiled eager]

prints a Markdown table for docs/benchmarks.md: the median step, peak memory and the first step, which holds the
compilation. Steps follow each other as in training, where the host does not wait for the GPU at the end of each; the
GPU's clock tells when one begins. The mode "graphs" is compiled code in CUDA graphs, whose own memory is not counted.
bfloat16 comes again at the end, to judge how much a host swings. On a CPU the model is smaller. Peers: a fake
quantization of all operands written by hand with the operators of altgrad.quantization, and torchao's float8 training,
where torchao is installed.
"""

import argparse
import gc
import statistics
import sys
import time
import warnings
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from altgrad.quantization import E4M3, E5M2, compute_scale, quantize
from altgrad.simulation import simulate

warnings.filterwarnings("error", message="altgrad computes on the CPU without")  # ALTGRAD_CPU_TARGET=aten asks for that
WARM, REPEATS = 3, 25
TO_COMPILE = {"compiled": None, "graphs": "reduce-overhead"}


class Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, layers, width, heads, context, vocabulary=50257):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ByHand(torch.autograd.Function):
    """A linear layer as research code has it: every operand fake-quantized per tensor, in the dtype at hand."""

    @staticmethod
    def forward(ctx, x, w, bias):
        x, w = (quantize(t, E4M3, compute_scale(t, E4M3)) for t in (x, w))
        ctx.save_for_backward(x, w)
        return F.linear(x, w, bias)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        rounded = quantize(grad, E5M2, compute_scale(grad, E5M2))
        return rounded @ w, rounded.flatten(0, -2).t() @ x.flatten(0, -2), grad.flatten(0, -2).sum(0)


class LinearByHand(nn.Linear):
    def forward(self, x):
        dtype = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
        return ByHand.apply(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


def by_hand(model):
    for layer in model.blocks.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = LinearByHand


def torchao_float8(model):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    for block in model.blocks:
        convert_to_float8_training(block, config=Float8LinearConfig.from_recipe_name("tensorwise"))


PEERS = {"bfloat16": lambda model: None, "fake quantization by hand": by_hand, "torchao float8": torchao_float8}


def mark(device):
    """A point in time: of the GPU, where what comes next begins."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first, second):
    """Milliseconds."""
    return (second - first) * 1e3 if isinstance(first, float) else first.elapsed_time(second)


def measure(change, device, mode, shape, context, batch):
    """(median step, first step) in milliseconds and peak memory in GB."""
    torch.compiler.reset()
    gc.collect()  # the model before, which its compiled code refers to
    torch.manual_seed(0)
    model = GPT2(*shape, context).to(device)
    simulation = change(model)
    if mode != "eager":
        for block in model.blocks:
            block.compile(mode=TO_COMPILE[mode])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    tokens = torch.randint(50257, (batch, context), device=device)
    marks = []
    for step in range(WARM + REPEATS):
        if step == WARM and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        marks.append(mark(device))
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if simulation is not None:
            simulation.step()
    marks.append(mark(device))
    if device == "cuda":
        torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
    times = list(map(between, marks, marks[1:]))
    return statistics.median(times[WARM:]), times[0], memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipes", nargs="+", default=["fp8_current", "mxfp8", "nvfp4"])
    parser.add_argument("--modes", nargs="+", default=["compiled", "eager"], choices=[*TO_COMPILE, "eager"])
    arguments = parser.parse_args()
    is_gpu = arguments.device == "cuda"
    shape, context, batch = ((12, 768, 12), 1024, 16) if is_gpu else ((2, 128, 4), 128, 4)
    changes = PEERS | {
        name: lambda model, name=name: simulate(model, name, skip=["head"]) for name in arguments.recipes
    }
    changes["bfloat16, again"] = PEERS["bfloat16"]
    print(f"{torch.cuda.get_device_name() if is_gpu else 'CPU'}, torch {torch.__version__}, {date.today()}; ", end="")
    print(f"layers, width, heads {shape}, {batch} x {context} tokens\n", flush=True)
    print("| | mode | ms a step | of bfloat16 | peak GB | of bfloat16 | first step, s | of bfloat16 |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for mode in arguments.modes:
        base = None
        for name, change in changes.items():
            try:
                step, first, memory = measure(change, arguments.device, mode, shape, context, batch)
            except ImportError as error:
                print(f"| {name} | {mode} | left out: {error} |", flush=True)
                continue
            base = base or (step, memory, first)
            print(
                f"| {name} | {mode} | {step:.1f} | {step / base[0]:.2f} | {memory:.1f} | {memory / base[1]:.2f} | "
                f"{first / 1e3:.1f} | {first / base[2]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
