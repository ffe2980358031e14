"""The report of a checkpoint beside one read of it and one quantization for each candidate.

    python tests/benchmarks/report.py [megabytes] [dtype]

writes a checkpoint (2000 MB of bfloat16 by default: embedding, attention, gated network, norms, outliers in a channel
of each) and runs three processes in turns, three times each: one reads every tensor and computes its scale and
``quantize`` once for each candidate, or ``quantize_blocks``; one makes the report; ``altgrad report`` does that from
the command line, imports, page and recommendation included. Printed are the least seconds, the least seconds of
processor time of the whole process (steadier where others compute too), and the largest memory of the process.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from altgrad.quantization import compute_scale, quantize, quantize_blocks
from altgrad.report import DEFAULT, candidate, cli, report_weights

WIDTH = 2048


def write(path: Path, megabytes: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {"embedding.weight": (16000, WIDTH)}
    block = {"attention.qkv": (3 * WIDTH, WIDTH), "attention.out": (WIDTH, WIDTH)}
    block |= {"mlp.gate": (3 * WIDTH, WIDTH), "mlp.up": (3 * WIDTH, WIDTH), "mlp.down": (WIDTH, 3 * WIDTH)}
    of_block = sum(rows * columns for rows, columns in block.values())
    elements = megabytes * 10**6 // dtype.itemsize - 16000 * WIDTH
    for i in range(max(1, elements // of_block)):
        tensors |= {f"layers.{i}.{name}.weight": shape for name, shape in block.items()}
        tensors[f"layers.{i}.norm.weight"] = (WIDTH,)
    made = {}
    for name, shape in tensors.items():
        x = torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=g)
        x[..., 7] *= 20
        made[name] = x
    save_file(made, path)


def baseline(path: Path) -> None:
    """One read, and one quantization for each candidate."""
    chosen = [candidate(name) for name in DEFAULT]
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            x = file.get_tensor(name)
            x = x if x.ndim > 1 else x.unsqueeze(0)
            for c in chosen:
                if c.rule.per == "tensor":
                    quantize(x, c.format, compute_scale(x, c.format))
                else:
                    quantize_blocks(x, c.format, granularity=c.granularity, **c.keywords)


def run(what: str, path: Path) -> tuple[float, float, float]:
    """Seconds, seconds of processor time and peak gigabytes of a process that does it."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--work", what, str(path)], capture_output=True, text=True, check=True
    )
    wall = time.perf_counter() - start
    seconds, processor, gigabytes = map(float, done.stdout.split()[-3:])
    return wall if what == "altgrad report" else seconds, processor, gigabytes


def work(what: str, path: Path) -> None:
    """What a process does, and its seconds, seconds of processor time and peak gigabytes on the last line."""
    start = time.perf_counter()
    if what == "baseline":
        baseline(path)
    elif what == "report":
        report_weights(path)
    else:
        assert cli.main(["report", str(path), "-o", str(path.parent)]) == 0
    # VmHWM is the process's own; ru_maxrss starts at what the parent had when it started this one.
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    print(time.perf_counter() - start, time.process_time(), int(peak) * 1024 / 1e9)


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        return work(sys.argv[2], Path(sys.argv[3]))
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    dtype = getattr(torch, sys.argv[2] if len(sys.argv) > 2 else "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write(path, megabytes, dtype)
        gigabytes, threads = path.stat().st_size / 1e9, torch.get_num_threads()
        print(f"{gigabytes:.2f} GB, {dtype}, {len(DEFAULT)} candidates, {threads} threads")
        results: dict[str, list[tuple[float, float, float]]] = {"baseline": [], "report": [], "altgrad report": []}
        for _ in range(3):
            for what, found in results.items():
                found.append(run(what, path))
        least = {what: [min(column) for column in zip(*found)] for what, found in results.items()}
        for what, found in results.items():
            ratios = " ".join(
                f"{mine:8.2f} s ({mine / its:.2f})" for mine, its in zip(least[what][:2], least["baseline"])
            )
            print(f"{what:15} wall, processor: {ratios}  {max(row[2] for row in found):.2f} GB")


if __name__ == "__main__":
    main()
