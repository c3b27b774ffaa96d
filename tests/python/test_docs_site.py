"""The documentation site: no warnings, no link that leads nowhere, and complete references."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import vllm_efa_ep
from vllm_efa_ep import errors
from vllm_efa_ep.cli import parser
from vllm_efa_ep.config import SETTINGS

pytest.importorskip("mkdocs", reason="needs MkDocs: pip install 'vllm-efa-ep[docs]'")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; --strict makes every warning an error."""
    directory: Path = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


class Page(HTMLParser):
    """Anchors, links and text of one page."""

    def __init__(self, path: Path) -> None:
        """Read it."""
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Keep what links and what is linked to."""
        given = {name: value for name, value in attributes if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("script", "img", "link") and ("src" in given or "href" in given):
            self.resources.append(given.get("src", given.get("href", "")))

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.text += data


def pages(site: Path) -> dict[Path, Page]:
    """Return all pages by their file."""
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def leads_somewhere(link: str, path: Path, built: dict[Path, Page]) -> bool:
    """Whether a link on the page ``path`` leads to a file of the site, and an anchor in it; or elsewhere."""
    target = urlsplit(link)
    if target.scheme or target.netloc:
        return True
    file = (path.parent / unquote(target.path)).resolve() if target.path else path
    file = file / "index.html" if file.is_dir() else file
    if file.suffix != ".html":
        return file.exists()
    return file in built and (not target.fragment or unquote(target.fragment) in built[file].anchors)


def test_every_internal_link_leads_somewhere(site: Path) -> None:
    """Links that tools generate included."""
    built = pages(site)
    assert len(built) > 10
    broken = [
        f"{path.relative_to(site)}: {link}"
        for path, page in built.items()
        for link in page.links
        if not leads_somewhere(link, path, built)
    ]
    assert not broken, "\n".join(broken)


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    """It can be read on a cluster without a way out."""
    for path, page in pages(site).items():
        foreign = [each for each in page.resources if urlsplit(each).netloc]
        assert not foreign, f"{path.relative_to(site)} loads {foreign}"


def test_every_page_is_on_the_site(site: Path) -> None:
    """Also those that mkdocs.yml forgot."""
    front = Page(site / "index.html")
    for source in (ROOT / "docs").rglob("*.md"):
        page = source.relative_to(ROOT / "docs").with_suffix("")
        assert f"{page}/" in front.links, f"{source} is not in the navigation"


def test_the_python_reference_is_complete(site: Path) -> None:
    """Every public name and every error, with what it documents."""
    reference = Page(site / "reference" / "python" / "index.html")
    shown = shown_in_pages()
    assert {"TorchBootstrap", "run_on_ray"} <= shown
    names = [*vllm_efa_ep.__all__, *shown, "RayBootstrap", "ExpertTransfer", "plan_moves"]
    names += [name for name, each in vars(errors).items() if isinstance(each, type)]
    ends = {anchor.rpartition(".")[2] for anchor in reference.anchors}
    assert not set(names) - ends
    for method in ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv", "drain", "close"):
        assert f"vllm_efa_ep.all_to_all.AllToAll.{method}" in reference.anchors
    assert "Too many tokens, an id out of range" in reference.text


def shown_in_pages() -> set[str]:
    """Return what the pages' own Python code imports of this package."""
    text = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    blocks = "".join(re.findall(r"^```python.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = re.findall(r"^from vllm_efa_ep[\w.]* import (.+)$", blocks, re.MULTILINE)
    return {name.strip() for line in lines for name in line.split(",")}


def options_of(command: argparse.ArgumentParser) -> set[str]:
    """Return all options of a parser and of its commands."""
    found: set[str] = set()
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                found |= options_of(each)
        elif not isinstance(action, argparse._HelpAction):
            found |= set(action.option_strings)
    return found


def test_the_command_line_reference_is_complete(site: Path) -> None:
    """Every option of every command, read from the parser itself."""
    text = Page(site / "reference" / "cli" / "index.html").text
    options = options_of(parser())
    assert "--markdown" in options
    assert not [option for option in options if option not in text]


def test_every_setting_is_documented(site: Path) -> None:
    """On the page that is generated from them."""
    text = Page(site / "settings" / "index.html").text
    assert not [setting.variable for setting in SETTINGS if setting.variable not in text]


def test_a_page_that_nobody_listed_goes_under_more() -> None:
    """Protects the hook against a change of MkDocs."""
    specification = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert specification is not None
    assert specification.loader is not None
    hooks = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hooks)
    assert list(hooks.pages_of([{"A": "a.md"}, {"B": ["b.md", {"C": "c.md"}]}])) == ["a.md", "b.md", "c.md"]
