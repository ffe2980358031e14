"""What the documentation shows is run, what it generates is current, and what it promises about itself holds."""

import doctest
import importlib.util
import inspect
import pkgutil
import re
import sys
import tomllib
from pathlib import Path

import processes
import pytest
import torch

import altgrad
import altgrad.storage
import ops_registry

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))
import generate  # noqa: E402

PAGES = [*generate.PAGES, ROOT / "CONTRIBUTING.md"]
MODULES = [
    module.name
    for package in (altgrad, ops_registry)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if importlib.util.find_spec(module.name).origin.endswith(".py")  # the C library is none of Python's
]
OPTIONAL = ("onnxscript", "triton")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [block for tag, block in fenced if tag == language]


# deployment.md has scripts, which test_deploy.py runs as such; elsewhere a page says that its first block is enough.
AFTER_THE_FIRST = "\n\nEach of the other blocks on this page runs after this one alone.\n"
SCRIPTS = "deployment.md"


@pytest.mark.compiles
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != SCRIPTS], ids=lambda page: page.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """Each Python block of a page after the first one, in a namespace of its own and an empty folder."""
    monkeypatch.chdir(tmp_path)
    first, *others = blocks(page, "python") or [None]
    if first is None:
        pytest.skip("no Python in it")
    assert (f"```python\n{first}```{AFTER_THE_FIRST}" in page.read_text()) == bool(others)
    for block in others or [""]:
        torch.compiler.reset()
        namespace = {"__name__": page.stem}
        for code in (first, block):
            exec(compile(code, str(page), "exec"), namespace)
    if page.name == "README.md":
        assert namespace["x"].grad.equal(torch.ones(10))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    assert doctest.testmod(module).failed == 0


def test_there_are_docstring_examples():
    """Every public function has an example."""
    packages = altgrad.quantization, altgrad.simulation, altgrad.storage
    public = [getattr(package, name) for package in packages for name in package.__all__]
    functions = [value for value in public if inspect.isfunction(value)]
    assert [f.__name__ for f in functions if ">>> " not in (f.__doc__ or "")] == []


@pages
def test_generated_parts_are_current(page):
    if page.name == "numerics.md" and torch.__version__ < "2.12":
        pytest.skip("torch's cast to float8_e4m3fn saturates since 2.12")
    if page.name == "operators.md" and not torch._C._dispatch_has_kernel_for_dispatch_key("altgrad::quantize", "CPU"):
        pytest.skip("the C kernels were not built")
    text = page.read_text()
    assert text.count("<!-- generated: ") == text.count("<!-- end -->")
    assert generate.render(text) == text, "run python docs/generate.py"


@pages
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


def test_pages_are_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 100
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 60


def test_ci_runs_the_commands_of_the_readme():
    run = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [
        line.replace(".venv", ".venv-ci") for block in blocks(ROOT / "README.md", "sh") for line in block.split("\n")
    ]
    assert any("pytest" in line for line in commands)
    assert [line for line in commands if line and line not in run] == []


def test_constraints_pin_all_and_name_no_host():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {"torch", *(name for extra in ("test", "examples") for name in project["optional-dependencies"][extra])}
    assert {re.match(r"[\w-]+", name)[0].lower().replace("_", "-") for name in wanted} <= pinned


def test_pre_commit_has_the_versions_of_ci():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    revisions = dict(
        re.findall(r"repo: https://github.com/\S+/(?:mirrors-)?(\S+?)(?:-pre-commit)?\n +rev: v(\S+)", hooks)
    )
    pinned = dict(re.findall(r"^(.*)==(.*)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert revisions == {name: pinned[name] for name in ("ruff", "clang-format")}


@pytest.mark.compiles
def test_the_quoted_error_is_what_a_missing_import_gives(tmp_path):
    """docs/operators.md quotes what torch.export.load says in a process that has not imported ops_registry."""
    (quoted,) = [block for block in blocks(ROOT / "docs" / "operators.md", "") if "We failed" in block]

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.ops.altgrad.quantize(x, x.abs().amax(), "E4M3")

    torch.export.save(torch.export.export(Model(), (torch.randn(3),)), tmp_path / "model.pt2")
    load = "import torch; torch.export.load('model.pt2')"
    result = processes.run(load, cwd=tmp_path)
    assert result.returncode == 1
    for line in quoted.strip().splitlines():
        assert line in result.stderr
