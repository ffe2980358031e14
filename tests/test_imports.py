"""The arrows of the house, each held in a fresh process."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.compiles


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ops_registry_alone_registers_everything():
    run(
        "import sys, torch, ops_registry\n"
        "assert len(ops_registry.operators.OPERATORS) >= 9\n"
        "for name in ops_registry.operators.OPERATORS: getattr(torch.ops.altgrad, name).default\n"
        "assert not {'altgrad', 'triton', 'torch._inductor', 'torch._dynamo'} & set(sys.modules)"
    )


def test_altgrad_imports_no_compiler():
    run(
        "import sys, altgrad.quantization\n"
        "names = {'triton', 'torch._inductor', 'torch._dynamo', 'torch.distributed.tensor', 'onnx', 'numpy.testing'}\n"
        "names |= {'safetensors', 'scipy', 'click'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)"
    )


def test_formats_need_the_standard_library_alone():
    run(
        "import importlib.util, sys\n"
        "folder = importlib.util.find_spec('ops_registry').submodule_search_locations[0]\n"
        "spec = importlib.util.spec_from_file_location('formats', folder + '/formats.py')\n"
        "formats = sys.modules['formats'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(formats)\n"
        "assert formats.resolve('E5M2').max_representable_value == 57344\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )


def test_every_module_imports_first():
    """Forked from a process that has torch."""
    run(
        "import importlib, os, pkgutil, torch\n"
        "folder = importlib.util.find_spec('ops_registry').submodule_search_locations\n"
        "names = [module.name for module in pkgutil.iter_modules(folder)]\n"
        "assert {'aten', 'vmap', 'cpu'} <= set(names)\n"
        "for name in sorted(set(names) - {'cuda_kernels', '_kernels'}):\n"  # Triton's language, and C
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        importlib.import_module(f'ops_registry.{name}')\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, name"
    )
