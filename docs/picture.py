"""Draw README's picture of a cascade from a finished demo: python docs/picture.py demo/run docs/cascade.png

The page is the report's own drawing of one query; headless Chromium makes a picture of it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cascade_engine.evaluation.page import write_report
from cascade_engine.evaluation.run_report import ReportConfig, run_sections
from cascade_engine.plan import CascadePlan
from cascade_engine.training.run import Run


def main(run: str, picture: str, query: int = 0) -> None:
    """Write the picture of the query that is drawn with the seed `query`."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("chromium is needed to draw the page")
    plan = CascadePlan.preset("cpr", oracle="flow", trainee="rgb", k=5)
    sections = run_sections(Run.open(run), ReportConfig(plan=plan, queries=1, seed=query))
    drawn = [section for section in sections if "cascade" in section.title]
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(Path(folder) / "page.html", "A cascade", drawn)
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        shot = [f"--screenshot={Path(picture).absolute()}", "--window-size=1160,1200", page.as_uri()]
        subprocess.run([browser, *options, *shot], check=True, capture_output=True)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
