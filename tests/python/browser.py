"""A headless Chromium, as a person's browser would show a page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service


@contextmanager
def open_browser(width: int = 1280, height: int = 900) -> Iterator[Chrome]:
    """Start Debian's Chromium; its console messages are in ``get_log("browser")``."""
    driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or browser is None:
        raise FileNotFoundError("no Chromium; apt-get install chromium chromium-driver, as `make test` does")
    options = ChromeOptions()
    options.binary_location = browser
    # Chromium refuses to run as root with its sandbox; the pages are our own.
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options, Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()
