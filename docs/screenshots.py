"""Pictures of the benchmark's report.

docs/bench_report.png, the only one that is committed, is made so:

    vllm-efa-ep bench --ranks 2 --ranks-per-node 1 --tokens 1,16,128,1024 --against gloo-agrs,gloo-a2a
    python docs/screenshots.py efa_ep_bench/bench.html build/screenshots
    cp build/screenshots/top.png docs/bench_report.png

Needs Debian's chromium and chromium-driver, and selenium, as the tests do.
"""

import argparse
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By


def main(words: list[str] | None = None) -> None:
    """Write the top of the page, the whole page, and each plot by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args(words)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    # Chromium refuses to run as root with its sandbox; the page is our own.
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1000,1280"):
        options.add_argument(argument)
    browser = Chrome(options, Service("/usr/bin/chromedriver"))
    try:
        browser.get(arguments.report.resolve().as_uri())
        browser.save_screenshot(str(arguments.directory / "top.png"))
        # What lies outside the window is cut off.
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(1000, height + 200)
        browser.save_screenshot(str(arguments.directory / "report.png"))
        for figure in browser.find_elements(By.TAG_NAME, "figure"):
            drawing = figure.find_element(By.TAG_NAME, "svg")
            drawing.screenshot(str(arguments.directory / f"{figure.get_attribute('id')}.png"))
    finally:
        browser.quit()
    print(*sorted(path.name for path in arguments.directory.glob("*.png")))


if __name__ == "__main__":
    main()
