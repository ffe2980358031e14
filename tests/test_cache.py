"""A change of numerics never meets old compiled code: the revision is part of the key of the on-disk caches."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.compiles

# Each release is a process, forked from one that has imported torch and compiled nothing.
PROCESSES = """
import os
import torch
import torch._inductor.compile_fx
import ops_registry.aten, ops_registry.first_use, ops_registry.functionalize
from torch._dynamo.utils import counters
project = ops_registry.aten.project
for revision, offset in (("1", 0.0), ("1", 0.0), ("1", 1.0), ("2", 1.0)):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    ops_registry.first_use.NUMERICS_REVISION = revision
    ops_registry.aten.project = lambda *args: project(*args) + offset  # what another release computes
    f = torch.compile(lambda x: torch.ops.altgrad.quantize(x, torch.tensor(1.0), "E5M2") * 2, fullgraph=True)
    print(f(torch.ones(4)).tolist()[0], counters["aot_autograd"]["autograd_cache_hit"], flush=True)
    os._exit(0)
"""


def test_two_releases_and_one_cache(tmp_path):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    # An empty folder has no precompiled headers and not what the compiler can do: this test needs neither.
    env |= {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    done = subprocess.run([sys.executable, "-c", PROCESSES], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "2.0 0",
        "2.0 1",  # a warm start works
        "2.0 1",  # the danger: without a new revision the old code is taken
        "4.0 0",  # a new revision never meets it
    ]
