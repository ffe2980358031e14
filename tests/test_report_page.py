"""The page of a report in a headless browser, where there is one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from altgrad.report import assign, report_weights
from altgrad.report.page import render


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    g = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(32, 64, generator=g) * 2.0**i for i in range(4)}
    tensors["layers.2.weight"][3, 3] = float("nan")
    tensors["layers.3.weight"][:, ::32] *= 100
    tensors["</script><b>.weight"] = torch.ones(4, 4)
    torch.save({**tensors, "bias": torch.ones(3), "steps": torch.tensor(1)}, folder / "model.pt")
    report = report_weights(folder / "model.pt", ["E0M7", "E4M3", "MXFP4"])
    choice = assign(report, 6)
    report.loss, choice.loss = float("inf"), 0.25  # as if of data
    (folder / "report.html").write_text(render(report, choice))
    return folder / "report.html"


def test_the_page_asks_the_network_for_nothing(page_file):
    text = page_file.read_text()
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|script|img|iframe)[^>]*(src|href)=\"(?!data:)", text)
    assert text.count("</script>") == 2  # no name of a tensor ends the data


HELPERS = """
    const all = selector => [...document.querySelectorAll(selector)];
    const one = selector => document.querySelector(selector);
    const column = (table, index) => all(`#${table} tbody tr`).map(row => row.cells[index].textContent);
    const named = text => all("#layers tbody button").find(button => button.textContent === text);
    function click(element) {  // what a mouse would meet in its middle
        element.scrollIntoView({ block: "center", inline: "center" });
        const box = element.getBoundingClientRect();
        document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2).click();
    }
    function enter(selector, field, value) {
        one(selector)[field] = value;
        one(selector).dispatchEvent(new Event("input"));
    }
"""


@pytest.fixture
def run(page_file):
    """Opens the page in a browser of its own and runs a script in it; what that returns. Nothing may complain."""
    # ImportError: the package is there, a library of the system's that it needs is not.
    pytest.importorskip("PySide6.QtWebEngineCore", exc_type=ImportError)

    def run(script, *pdf, console=()):
        program = [sys.executable, str(Path(__file__).with_name("browser.py")), str(page_file), *map(str, pdf)]
        done = subprocess.run(program, input=HELPERS + script, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["console"] == list(console)
        assert found["requests"] == [page_file.as_uri()]
        return found["result"]

    return run


@pytest.mark.compiles
def test_the_browser_sees_errors_and_requests(run, page_file, tmp_path):
    """The page without the rule against requests: what must not be is seen where it is."""
    bad = page_file.read_text().replace("img-src data:", "img-src data: http:")
    bad = bad.replace("</main>", "</main><img src='http://127.0.0.1:9/a'>").replace(
        "\nlayersTable();", "\nlayersTable(none);"
    )
    (tmp_path / "bad.html").write_text(bad)
    program = [sys.executable, str(Path(__file__).with_name("browser.py")), str(tmp_path / "bad.html")]
    done = subprocess.run(program, input="return 1 + 1", capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["result"] == 2
    assert found["console"] == ["Uncaught ReferenceError: none is not defined"]
    assert found["requests"][1:] == ["http://127.0.0.1:9/a"]


@pytest.mark.compiles
def test_tables_sort(run):
    before, down, head, up, candidates = run("""
        const states = [column("layers", 2)];
        const head = () => one("#layers thead th:nth-child(3)");
        click(head().querySelector("button"));
        states.push(column("layers", 2), head().getAttribute("aria-sort"));
        click(head().querySelector("button"));
        states.push(column("layers", 2));
        click(one("#candidates thead th:first-child button"));
        return [...states, column("candidates", 0)];
    """)

    def numbers(texts):
        return [float(text) for text in texts if text not in ("NaN", "exact")]

    assert len(before) == 5 and sorted(before) == sorted(down) == sorted(up)
    assert before != down and numbers(down) == sorted(numbers(before), reverse=True)
    assert numbers(up) == sorted(numbers(before))
    assert down[-1] == up[-1] == "NaN"
    assert head == "descending"
    assert candidates == ["E0M7", "E4M3", "MXFP4"]


@pytest.mark.compiles
def test_a_click_shows_the_layer(run):
    before, title, picture, rows, focus = run("""
        const before = one("#detail-title").textContent;
        click(named("layers.1.weight"));
        const picture = one("#histogram svg > title").textContent, rows = all("#scores tbody tr").length;
        return [before, one("#detail-title").textContent, picture, rows, document.activeElement.id];
    """)
    assert (before, title) == ("A layer", "layers.1.weight")
    assert picture.startswith("Values of layers.1.weight by octave, 2048 in all, 0 zeros")
    assert (rows, focus) == (3, "detail")


@pytest.mark.compiles
def test_metrics_filter_and_vectors(run):
    flushed, without, names, filtered = run("""
        const without = column("layers", 0);
        enter("#metric", "value", "2");
        const flushed = column("layers", 2);
        enter("#vectors", "checked", true);
        const names = column("layers", 0);
        enter("#filter", "value", "LAYERS.3");
        return [flushed, without, names, column("layers", 0)];
    """)
    assert all(text.endswith("%") or text in ("0", "NaN") for text in flushed)
    assert "bias" not in without and "bias" in names
    assert filtered == ["layers.3.weight"]


@pytest.mark.compiles
def test_names_are_text_and_what_is_broken_or_recommended_is_marked(run):
    names, bold, chosen, problem, summary = run("""
        const problem = one("#layers .problem").textContent, summary = one("#summary").textContent;
        return [column("layers", 0), all("#layers b").length, all("#layers td.chosen").length, problem, summary];
    """)
    assert "</script><b>.weight" in names and bold == 0
    assert chosen == 4
    assert problem == " 1 NaN, 0 inf"
    assert "bits for weights on average" in summary and "1 have NaN or infinities" in summary
    assert "Loss Infinity, with the recommended recipes 0.25000." in summary


@pytest.mark.compiles
def test_pictures_have_text_and_colors_have_contrast(run):
    """WCAG 2: at least 4.5 between a cell's text and its color; every picture has a text."""
    titles, legend, pairs = run("""
        click(named("layers.0.weight"));
        const titles = all("svg[role=img]").map(picture => picture.querySelector(":scope > title") !== null);
        const colors = Array.from({ length: 101 }, (_, i) => color(i / 100));
        const pairs = colors.map(c => [c, ink(c) === "#fff" ? 255 : 0]);
        return [titles, one("#legend").getAttribute("aria-label"), pairs];
    """)
    assert titles == [True] and legend

    def luminance(rgb):
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for rgb, ink in pairs:
        low, high = sorted((luminance(rgb), luminance([ink] * 3)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, rgb
    lightness = [luminance(rgb) for rgb, _ in pairs]
    assert lightness == sorted(lightness)  # readable without any color


@pytest.mark.compiles
def test_print(run, tmp_path):
    script = """
        matchMedia("print").addEventListener("change", event => {
            if (event.matches) console.log(getComputedStyle(one(".controls")).display);
        });
        return getComputedStyle(one(".controls")).display;
    """
    assert run(script, tmp_path / "report.pdf", console=["none"]) == "block"
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
