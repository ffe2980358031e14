"""The page of a report in a headless browser, where there is one."""

import re
import shutil

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
    (folder / "report.html").write_text(render(report, assign(report, 6)))
    return folder / "report.html"


def test_the_page_asks_the_network_for_nothing(page_file):
    text = page_file.read_text()
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|script|img|iframe)[^>]*(src|href)=\"(?!data:)", text)
    assert text.count("</script>") == 2  # no name of a tensor ends the data


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium or google-chrome")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, page_file):
    page = browser.new_page()
    page.problems, page.requests = [], []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(page_file.as_uri())
    yield page
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    page.close()


def column(page, table, index):
    return page.eval_on_selector_all(f"#{table} tbody tr", f"rows => rows.map(r => r.cells[{index}].textContent)")


@pytest.mark.compiles
def test_tables_sort(page):
    original = column(page, "layers", 2)
    assert len(original) == 5
    page.click("#layers thead th:nth-child(3) button")
    numbers = [float(text) for text in column(page, "layers", 2) if text not in ("NaN", "exact")]
    assert numbers == sorted(numbers, reverse=True)
    assert column(page, "layers", 2)[-1] == "NaN"
    assert page.get_attribute("#layers thead th:nth-child(3)", "aria-sort") == "descending"
    page.click("#layers thead th:nth-child(3) button")
    numbers = [float(text) for text in column(page, "layers", 2) if text not in ("NaN", "exact")]
    assert numbers == sorted(numbers)
    page.click("#candidates thead th:first-child button")
    assert column(page, "candidates", 0) == ["E0M7", "E4M3", "MXFP4"]


@pytest.mark.compiles
def test_a_click_shows_the_layer(page):
    page.click("text=layers.1.weight")
    assert page.text_content("#detail-title") == "layers.1.weight"
    title = page.text_content("#histogram svg > title")
    assert title.startswith("Values of layers.1.weight by octave, 2048 in all, 0 zeros")
    assert page.locator("#scores tbody tr").count() == 3
    assert page.evaluate("document.activeElement.id") == "detail"


@pytest.mark.compiles
def test_metrics_filter_and_vectors(page):
    page.select_option("#metric", "2")  # flushed
    assert all(text.endswith("%") or text in ("0", "NaN") for text in column(page, "layers", 2))
    page.check("#vectors")
    assert "bias" in column(page, "layers", 0)
    page.fill("#filter", "LAYERS.3")
    assert column(page, "layers", 0) == ["layers.3.weight"]


@pytest.mark.compiles
def test_names_are_text(page):
    assert "</script><b>.weight" in column(page, "layers", 0)
    assert page.locator("#layers b").count() == 0


@pytest.mark.compiles
def test_what_is_recommended_and_what_is_broken_is_marked(page):
    assert page.locator("#layers td.chosen").count() == 4
    assert page.text_content("#layers .problem") == " 1 NaN, 0 inf"
    assert "6" in page.text_content("#summary")


@pytest.mark.compiles
def test_pictures_have_text_and_colors_have_contrast(page):
    """WCAG 2: at least 4.5 between a cell's text and its color; every picture has a text."""
    page.click("text=layers.0.weight")
    assert page.eval_on_selector_all("svg[role=img]", "all => all.every(s => s.querySelector(':scope > title'))")
    assert page.get_attribute("#legend", "aria-label")
    pairs = page.evaluate(
        "Array.from({length: 101}, (_, i) => { const c = color(i / 100); return [c, ink(c) === '#fff' ? 255 : 0]; })"
    )

    def luminance(rgb):
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for rgb, ink in pairs:
        low, high = sorted((luminance(rgb), luminance([ink] * 3)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, rgb
    lightness = [luminance(rgb) for rgb, _ in pairs]
    assert lightness == sorted(lightness)  # readable without any color


@pytest.mark.compiles
def test_print(page, tmp_path):
    page.emulate_media(media="print")
    assert not page.is_visible(".controls")
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
