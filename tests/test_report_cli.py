"""The command altgrad: what it prints and writes, exit codes, and that a failure leaves nothing behind."""

import importlib
import json
import os
import signal
import subprocess
import sys

import processes
import pytest
import torch
from test_report import bad_files

from altgrad.quantization import FORMAT_REGISTRY
from altgrad.report import Report, report_weights

pytest.importorskip("rich")
pytest.importorskip("click")

from altgrad.report import cli, weights


@pytest.fixture
def checkpoint(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(32, 64, generator=g) for i in range(3)}
    torch.save({**tensors, "norm.bias": torch.ones(5), "steps": torch.tensor([3])}, tmp_path / "model.pt")
    (tmp_path / "out").mkdir()
    return tmp_path / "model.pt"


def run(checkpoint, *options):
    return cli.main(["report", str(checkpoint), "-o", str(checkpoint.parent / "out"), *options])


def written(checkpoint):
    return sorted(file.name for file in (checkpoint.parent / "out").iterdir())


def test_report(checkpoint, capsys):
    assert run(checkpoint, "-c", "E4M3,mxfp4", "--budget", "5.6", "--worst", "2") == 0
    output = capsys.readouterr().out
    assert written(checkpoint) == ["report.html", "report.json"]
    report = Report.from_json((checkpoint.parent / "out" / "report.json").read_text())
    assert report == report_weights(checkpoint, ["E4M3", "MXFP4"])
    assert "recommended, 5.505 bits a weight" in output
    assert output.count("layers.") == 2  # the worst two
    assert "left out: 1 (int64" in output and "norm.bias" not in output


def test_budget_out_of_reach_is_said_and_the_report_written(checkpoint, capsys):
    assert run(checkpoint, "-c", "E4M3", "--budget", "2") == 0
    assert "no recommendation: budget_bits 2.0 is out of reach" in capsys.readouterr().out
    assert written(checkpoint) == ["report.html", "report.json"]


def test_nan_is_shown(checkpoint, capsys):
    torch.save({"w": torch.tensor([[float("nan"), 1.0]]), "v": torch.ones(2, 2)}, checkpoint)
    assert run(checkpoint, "-c", "E4M3", "--budget", "99") == 0
    assert "w: 1 NaN, 0 infinite" in capsys.readouterr().out


BAD = {
    "no such file": (["report", "none.pt"], "none.pt: no such file"),
    "no such folder": (["report", "none.pt", "-o", "nowhere"], "nowhere: no such folder"),
    "candidate": (["report", "none.pt", "-c", "E4M3,E9M9"], "unknown format 'E9M9'"),
    "no candidates": (["report", "none.pt", "-c", ","], "candidates must not be empty"),
    "option": (["report", "--fast"], "No such option"),
    "command": (["repot"], "No such command"),
    "number": (["report", "none.pt", "-b", "few"], "'few' is not a valid float"),
    "budget": (["report", "none.pt", "-b", "nan"], "--budget must be above 0, got nan"),
    "rows": (["report", "none.pt", "-n", "-1"], "Invalid value for '--worst' / '-n': -1 is not in the range x>=0"),
    "no path": (["report"], "Missing argument"),
    "no folder of the picture": (["formats", "--svg", "none/x.svg"], "No such file or directory: 'none/x.svg'"),
    "format": (["formats", "E9M9"], "unknown format 'E9M9'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("altgrad: ")
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_one_line_and_exit_code_2(checkpoint, tmp_path, capsys):
    """Truncated and foreign files of every kind."""
    for path in bad_files(tmp_path):
        assert cli.main(["report", str(path), "-o", str(tmp_path / "out")]) == 2, path
        captured = capsys.readouterr()
        assert captured.err.startswith(f"altgrad: {path}") and captured.err.count("\n") == 1, path
        assert captured.out == "" and written(checkpoint) == []


def test_interrupted(checkpoint, monkeypatch, capsys):
    """Ctrl-C while the second tensor is counted."""
    calls = []

    def layer(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    original = weights._layer
    monkeypatch.setattr(weights, "_layer", layer)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    try:
        assert run(checkpoint) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.strip() == "altgrad: interrupted, nothing was written"
    assert written(checkpoint) == []


@pytest.mark.compiles
def test_a_process_interrupted(checkpoint):
    """The signal of Ctrl-C while threads count a tensor."""
    torch.save([torch.ones(1 << 20) for _ in range(100)], checkpoint)
    code = """if True:
        import signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background leaves out
        from altgrad.report import cli, weights
        def layer(*arguments, original=weights._layer):
            print("a tensor", flush=True)
            return original(*arguments)
        weights._layer = layer
        sys.exit(cli.main(["report", *sys.argv[1:]]))
    """
    arguments = [sys.executable, "-P", "-c", code, str(checkpoint), "-o", str(checkpoint.parent / "out")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, message = process.communicate(timeout=120)
    assert (process.returncode, message.strip()) == (130, "altgrad: interrupted, nothing was written")
    assert written(checkpoint) == []


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_what_cannot_be_written_leaves_nothing(checkpoint, name, capsys):
    (checkpoint.parent / "out" / name).mkdir()
    assert run(checkpoint) == 2
    assert written(checkpoint) == [name]
    assert f"{name} is a folder" in capsys.readouterr().err


def test_only_files_are_written_over(tmp_path, capsys):
    """Renaming a file onto a device, /dev/null for one, would put the file in its place."""
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["formats", "--svg", str(tmp_path / "pipe")]) == 2
    assert capsys.readouterr() == ("", f"altgrad: {tmp_path}/pipe is no regular file\n")
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


def test_a_failure_while_writing_leaves_nothing(checkpoint, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("altgrad.report.results").os, "replace", interrupt)
    assert run(checkpoint) == 130
    assert written(checkpoint) == []


def test_formats(capsys, tmp_path):
    assert cli.main(["formats", "--svg", str(tmp_path / "line.svg")]) == 0
    output = capsys.readouterr().out
    assert all(name in output and f.spelling in output for name, f in FORMAT_REGISTRY.items())
    picture = (tmp_path / "line.svg").read_text()
    assert picture.startswith("<svg") and all(f"{f.spelling}," in picture for f in FORMAT_REGISTRY.values())


def test_values_of_a_format(capsys):
    assert cli.main(["formats", "e2m1b1f", "--values"]) == 0
    lines = capsys.readouterr().out.splitlines()[-16:]
    want = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [float(line.split()[-1]) for line in lines] == [*want, *(-value for value in want)]
    assert lines[9] == "0x9  1001  -0.5"


def test_help(capsys):
    for command in ("report", "formats"):
        assert cli.main([command, "--help"]) == 0
    output = capsys.readouterr().out
    assert all(word in output for word in ("PATH", "NAMES", "--candidates", "--budget", "--output", "--svg"))


@pytest.mark.compiles
def test_module_without_the_extra():
    code = "import sys, runpy; sys.modules['rich'] = None; runpy.run_module('altgrad', run_name='__main__')"
    done = processes.run(code)
    assert done.returncode == 1
    assert done.stderr == "altgrad: rich is missing: pip install 'altgrad[report]'\n"


def test_reading_json_that_is_no_report():
    low = {"source": "", "candidates": [], "layers": [], "left_out": [], "loss": "low"}
    for text in ("", "[]", "{}", json.dumps({"layers": [{}]}), json.dumps(low)):
        with pytest.raises(ValueError, match="not a report"):
            Report.from_json(text)


def test_names_that_look_like_markup(tmp_path, capsys):
    path, names = tmp_path / "names.pt", ["[/].weight", "h[red].0.weight", "[bold]nan.weight"]
    tensors = {name: torch.randn(8, 64) for name in names}
    tensors[names[2]][0, 0] = torch.nan
    torch.save(tensors, path)
    assert cli.main(["report", str(path), "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_formats_without_a_sign_have_no_negative_zero(capsys):
    assert cli.main(["formats", "UE4M3", "E4M3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "E4M3" in line]
    assert {row[0]: row[-1] for row in rows} == {"UE4M3": "no", "E4M3": "yes"}
