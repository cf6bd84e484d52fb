"""The report stage: a run directory's files to report.json, .md, .html, .csv and .junit.xml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evaluation.config import ReportConfig
from evaluation.report.exports import junit_xml, table_csv
from evaluation.report.numbers import build_numbers
from evaluation.report.page import render_html, render_markdown
from evaluation.report.run_files import read_run


def write_report(config: ReportConfig, run_dir: Path) -> dict[str, Any]:
    """Write the reports of a run; safe to repeat, the same files give the same bytes.

    Args:
        config: The report's section.
        run_dir: Folder of the run; parts that are not there yet are shown as missing.

    Returns:
        The headline: judge, num_prompts, num_asked, base, tuned and difference (each mean, low, high),
        distinguishable, and `line`, the one line a run ends with.

    Raises:
        EvaluationError: A file is broken, or files of different data lie together.
    """
    files = read_run(run_dir)
    numbers = build_numbers(files, config)
    _write(run_dir / "report.json", json.dumps(numbers, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    _write(run_dir / "report.md", render_markdown(numbers, files))
    _write(run_dir / "report.csv", table_csv(files))
    _write(run_dir / "report.junit.xml", junit_xml(files, config.pass_score))
    _write(run_dir / "report.html", render_html(numbers, files))
    headline: dict[str, Any] = numbers["headline"]
    return headline


def _write(path: Path, text: str) -> None:
    """Whole or not at all, as a reader may look at any time."""
    temporary = path.with_name(path.name + ".tmp")
    # A lone surrogate of a model's output is no UTF-8: it becomes its escape, which JSON reads back as it was.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)
