"""A change of numerics never meets old compiled code: the revision is part of the key of the on-disk caches."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.compiles

PROCESS = """
import sys
import torch
import ops_registry.aten, ops_registry.first_use, ops_registry.functionalize
revision, offset = sys.argv[1], float(sys.argv[2])
ops_registry.first_use.NUMERICS_REVISION = revision
project = ops_registry.aten.project_with_sign
ops_registry.aten.project_with_sign = lambda *args: project(*args) + offset  # a release that computes something else
from torch._dynamo.utils import counters
f = torch.compile(lambda x: torch.ops.altgrad.quantize(x, torch.tensor(1.0), "E5M2") * 2, fullgraph=True)
print(f(torch.ones(4)).tolist()[0], counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_two_releases_and_one_cache(tmp_path):
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    # An empty folder has no precompiled headers and not what the compiler can do: this test needs neither.
    env |= {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0", "TORCHINDUCTOR_VEC_ISA_OK": "0"}

    def process(revision, offset):
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, revision, str(offset)], capture_output=True, text=True, timeout=300, env=env
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()

    assert process("1", 0) == ["2.0", "0"]
    assert process("1", 0) == ["2.0", "1"]  # a warm start works
    assert process("1", 1) == ["2.0", "1"]  # the danger: without a new revision the old code is taken
    assert process("2", 1) == ["4.0", "0"]  # a new revision never meets it
