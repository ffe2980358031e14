"""DTensor, FSDP2 and tensor parallelism: the bits of one process, on 2 and 4 processes (distributed_worker.py)."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.compiles

WORKER = Path(__file__).with_name("distributed_worker.py")
CASES = re.findall(r"^@case\ndef (\w+)", WORKER.read_text(), re.MULTILINE)


def run_workers(size, device, results):
    """Runs every case on size processes; returns what failed: {case: {rank: traceback}}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RESULTS": str(results / "results")}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, WORKER, str(size), device]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    outcomes = [json.loads((results / f"results.{rank}").read_text()) for rank in range(size)]
    return {name: {rank: o[name] for rank, o in enumerate(outcomes) if o[name]} for name in outcomes[0]}


@pytest.fixture(
    scope="module",
    params=[(2, "cpu"), (4, "cpu"), pytest.param((2, "cuda"), marks=pytest.mark.gpu)],
    ids=lambda p: "-".join(map(str, p)),
)
def outcome(request, tmp_path_factory):
    size, device = request.param
    if device == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    return run_workers(size, device, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("name", CASES)
def test_case(outcome, name):
    for rank, text in outcome[name].items():
        pytest.fail(f"rank {rank}: {text}", pytrace=False)
