"""The benchmark's report as a reader sees it: every plot drawn, nothing loaded, nothing complained about."""

import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from bench_documents import document
from browser import open_browser
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from thread_world import until

from vllm_efa_ep.bench.problem import Cell
from vllm_efa_ep.bench.report import write_report

SCREENSHOTS = Path(__file__).parents[2] / "docs" / "screenshots.py"
PLOTS = {"latency-tokens", "latency-world", "breakdown", "work-requests", "wire-bytes"}
CELLS = [
    Cell(world, 1, hidden, "bf16", tokens, experts=16)
    for world in (2, 4)
    for hidden in (2048, 7168)
    for tokens in (1, 16, 128)
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """The report of an imaginary run, opened from a file."""
    path = tmp_path_factory.mktemp("report") / "bench.html"
    write_report(
        document({cell: [np.full(20, 100.0 + cell.tokens), np.full(20, 110.0)] for cell in CELLS}), path
    )
    with open_browser() as chrome:
        chrome.get(path.as_uri())
        yield chrome


def test_every_plot_is_drawn(page: Chrome) -> None:
    """Each figure has a picture of some size, inside the page, with marks and readable words in it."""
    figures = {figure.get_attribute("id"): figure for figure in page.find_elements(By.TAG_NAME, "figure")}
    assert set(figures) == PLOTS
    width = page.execute_script("return document.documentElement.clientWidth")
    for name, figure in figures.items():
        (svg,) = figure.find_elements(By.TAG_NAME, "svg")
        box = svg.rect
        assert box["width"] > 300, name
        assert box["height"] > 150, name
        assert box["x"] + box["width"] <= width, name
        assert svg.find_elements(By.CSS_SELECTOR, "path"), name
        words = " ".join(text.text for text in svg.find_elements(By.TAG_NAME, "text"))
        assert "ranks" in words or "hidden 7168" in words, f"{name}: {words}"
        assert figure.find_element(By.TAG_NAME, "figcaption").text


def test_the_table_has_every_cell(page: Chrome) -> None:
    """Two contestants and two starts of each."""
    assert len(page.find_elements(By.CSS_SELECTOR, "#cells tbody tr")) == 4 * len(CELLS)


def test_nothing_is_loaded_or_complained_about(page: Chrome) -> None:
    """No request beside the file itself, no console message, and words of the run run nothing."""
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.get_log("browser") == []
    assert "<script>alert(1)</script>" in page.find_element(By.TAG_NAME, "body").text


def test_it_fits_a_narrow_window(page: Chrome) -> None:
    """Wide tables scroll by themselves; the page does not."""
    page.set_window_size(600, 900)
    assert page.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )


def test_screenshots_are_made_by_a_script(page: Chrome, tmp_path: Path) -> None:
    """Of the page's top, of the whole page, and of each plot, none of which is cut off."""
    report = unquote(urlsplit(page.current_url).path)
    runpy.run_path(str(SCREENSHOTS))["main"]([report, str(tmp_path)])
    heights = {path.stem: height_of(path) for path in tmp_path.glob("*.png")}
    assert set(heights) == PLOTS | {"report", "top"}
    assert len({heights[name] for name in PLOTS}) == 1
    assert (
        heights["top"]
        < page.execute_script("return document.documentElement.scrollHeight")
        < heights["report"]
    )


def height_of(picture: Path) -> int:
    """Return the height of a PNG, which stands in its header."""
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n")
    return int.from_bytes(header[20:24], "big")


def test_the_oracle_of_this_file_sees_broken_pages(tmp_path: Path) -> None:
    """A page that loads something from elsewhere is noticed by what the tests above look at."""
    path = tmp_path / "broken.html"
    write_report(document({replace(CELLS[0], world=4): [np.full(3, 9.0)]}), path)
    text = path.read_text().replace("default-src 'none';", "default-src 'none'; img-src file:;")
    path.write_text(text.replace("<h1>", "<img src='missing.png'><h1>"))
    with open_browser() as chrome:
        chrome.get(path.as_uri())
        assert until(lambda: chrome.get_log("browser") != [])
