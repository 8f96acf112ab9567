"""Makes the picture of the README again: `python -m tests.picture results/<run>`.

From a run that is VALID, on a machine that does nothing else.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from broadcaster.loadtest.report.outcome import read_run
from broadcaster.loadtest.report.page.html import write_page
from tests.clients.programs import program
from tests.support import ROOT

PICTURE = ROOT / "docs" / "pictures" / "report.png"
SIZE = 1000, 1240
"""Verdict, figures, and the first two pictures."""


def main(folder: Path) -> None:
    outcome = read_run(folder)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        path = Path(place) / "report.html"
        write_page(outcome, path)
        browser = playwright.chromium.launch(executable_path=program("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
        page.goto(path.as_uri())
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
