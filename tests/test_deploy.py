"""Packages of AOTInductor in a C++ process without Python and altgrad, and the snippets of docs/deployment.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from conftest import assert_same_bits
from torch import nn

from altgrad.quantization import compute_scale, decode, encode, quantize

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/deployment.md").read_text()


@pytest.fixture(scope="module")
def run_package(tmp_path_factory):
    """docs/examples/run_package.cpp, built by the command that the page shows."""
    program = tmp_path_factory.mktemp("cpp") / "run_package"
    (command,) = re.findall(r"```sh\n(.*?g\+\+.*?)```", PAGE, re.DOTALL)
    command = command.replace("-o run_package", f"-o {program}").replace("python", sys.executable)
    subprocess.run(["bash", "-ec", command], check=True, cwd=ROOT, timeout=300)
    return program


class Model(nn.Module):
    """Reads codes as a deployed layer does, rounds and encodes activations. (On GPUs Inductor would contract a sum.)"""

    def __init__(self):
        super().__init__()
        self.codes = nn.Buffer(encode(torch.linspace(-2, 2, 16), "E3M4", 0.1))
        self.scale = nn.Buffer(torch.linspace(0.05, 0.4, 16))

    def forward(self, x):
        weight = decode(self.codes, "E3M4", self.scale)
        stored = decode(encode(x, "E4M3", self.scale), "E4M3", self.scale)
        return torch.maximum(torch.maximum(quantize(x * weight, "E5M2", 0.37), quantize(x, "E7M0", self.scale)), stored)


def test_aotinductor_from_cpp(run_package, device, tmp_path):
    model = Model().to(device)
    batch = torch.export.Dim.DYNAMIC
    exported = torch.export.export(model, (torch.randn(4, 16, device=device),), dynamic_shapes=({0: batch},))
    package = tmp_path / "model.pt2"
    torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    assert b"altgrad::" not in package.read_bytes()
    for rows in (1, 3, 40):
        output = subprocess.run(
            [run_package, package, str(rows), "16", device], check=True, capture_output=True, text=True, cwd=tmp_path
        ).stdout
        got = torch.tensor([[float.fromhex(number) for number in line.split()] for line in output.splitlines()])
        x = torch.arange(rows * 16, dtype=torch.float32).view(rows, 16).div(7).sub(20)
        assert_same_bits(got, model(x.to(device)))


@pytest.mark.gpu
def test_a_package_makes_scales_in_bfloat16_without_altgrad(tmp_path):
    """Where torch.compile calls the kernel for the largest of a tensor (tests/test_cuda.py)."""

    class Quantizes(torch.nn.Module):
        def forward(self, x):
            return quantize(x, "E4M3", compute_scale(x, "E4M3"))

    x, package = torch.randn(64, 96, dtype=torch.bfloat16, device="cuda"), tmp_path / "model.pt2"
    exported = torch.export.export(Quantizes(), (x,))
    torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    assert b"altgrad::" not in package.read_bytes()


SNIPPETS = re.findall(r"^## (.*?)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)


def test_every_block_is_a_snippet():
    assert len(SNIPPETS) == PAGE.count("```python")


@pytest.mark.parametrize(("title", "code"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_snippet(title, code, tmp_path):
    """Each runs as a script of its own, as a reader would run it, forked from what has imported the most of torch."""
    if "onnx" in code:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = processes.run(code, "torch._inductor.compile_fx", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
