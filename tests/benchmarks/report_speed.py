"""A report of 10,000 rows of 2 kB with hostile text in headless Chromium: when its table stands, and its searches.

    python tests/benchmarks/report_speed.py [--rows 10000] [--row-bytes 2000] [--rounds 5] [--json OUT.json]

Beside each figure stands what the same browser needs for the least that any such page must do, in the same run: to open
the same file as text without running anything, and to look through the same texts once. Chromium is driven through
Playwright (`apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from playwright.sync_api import Browser, sync_playwright

from evaluation.config import ReportConfig
from evaluation.report.build import write_report

REPORT_TESTS = Path(__file__).parents[1] / "evaluation" / "report"
SEARCHES = ("number 69993.", "quick", "zzz", "<script>", "[U+202E]", "")
SEARCH = """(words) => {
  const box = document.getElementById('search');
  const start = performance.now();
  box.value = words;
  box.dispatchEvent(new Event('input'));
  document.getElementById('rows').getBoundingClientRect();  // the rows are laid out
  return performance.now() - start;
}"""
LOOK_THROUGH = """(words) => {
  const { rows } = JSON.parse(document.getElementById('data-samples').textContent);
  const texts = rows.map((row) => JSON.stringify(row).toLowerCase());
  const start = performance.now();
  const found = texts.filter((text) => text.includes(words)).length;
  return [performance.now() - start, found];
}"""


def seconds_until(browser: Browser, page_file: Path, selector: str, *, scripts: bool) -> float:
    """From the navigation until an element stands in the page."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, java_script_enabled=scripts)
    page = context.new_page()
    start = time.perf_counter()
    page.goto(page_file.as_uri(), wait_until="commit")
    page.wait_for_selector(selector, state="attached")
    seconds = time.perf_counter() - start
    context.close()
    return seconds


def measure(browser: Browser, page_file: Path, rounds: int) -> dict[str, Any]:
    """Medians over the rounds; the first search is the first one after opening, when nothing is prepared."""
    tables = [seconds_until(browser, page_file, "#rows details", scripts=True) for _ in range(rounds)]
    plain = [seconds_until(browser, page_file, "#data-samples", scripts=False) for _ in range(rounds)]
    first, later, least = [], [], []
    for _ in range(rounds):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(page_file.as_uri())
        times = [page.evaluate(SEARCH, words) for words in SEARCHES]
        first.append(times[0])
        later += times[1:]
        least.append(page.evaluate(LOOK_THROUGH, "zzz")[0])
        pwned = page.evaluate("window.pwned")
        page.close()
        if pwned is not None:
            raise SystemExit(f"a script of the data ran ({pwned})")
    median = statistics.median
    return {
        "first_table_s": round(median(tables), 3),
        "first_table_worst_s": round(max(tables), 3),
        "open_as_text_s": round(median(plain), 3),
        "first_search_ms": round(median(first), 1),
        "first_search_worst_ms": round(max(first), 1),
        "search_ms": round(median(later), 1),
        "search_worst_ms": round(max(later), 1),
        "look_through_ms": round(median(least), 1),
        "table_to_open_ratio": round(median(tables) / median(plain), 2),
        "search_to_look_through_ratio": round(median(later) / median(least), 2),
    }


def main() -> None:
    """Build the report, open and search it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--row-bytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("there is no chromium on PATH (apt-get install chromium)")
    made = runpy.run_path(str(REPORT_TESTS / "synthetic.py"))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        run = made["make_run"](Path(folder) / "run", num_rows=args.rows, num_filler_chars=args.row_bytes // 2)
        start = time.perf_counter()
        write_report(ReportConfig(bootstrap_samples=1000), run)
        written = time.perf_counter() - start
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        found = {"rows": args.rows, "file_mb": round((run / "report.html").stat().st_size / 1e6, 1)}
        found |= {"report_stage_s": round(written, 1)} | measure(browser, run / "report.html", args.rounds)
        browser.close()
    text = json.dumps(found, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
