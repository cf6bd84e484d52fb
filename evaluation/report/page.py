"""report.json's numbers and the samples, to one self-contained HTML page and to Markdown.

Everything a model or a data set wrote is text here: Jinja2 escapes it, the sample table's JSON cannot close its
script element, its rows are inserted as text nodes, and a content security policy admits only the page's own script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files as package_files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from evaluation.report.headline import interval_text
from evaluation.report.run_files import RunFiles
from evaluation.report.scores import asked_ids, categories_of
from evaluation.rows import Row

# Characters that reorder or hide text: bidirectional marks, zero-width marks, byte order mark, control characters.
_DECEPTIVE = re.compile(
    "[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
)
_HEADING = re.compile(r"\s*^#{2,} *[\w ]{1,30}: *$\s*", re.MULTILINE)
MAX_CURVE_POINTS = 400
MAX_MARKDOWN_CHARS = 160
# Ends that the axis of a difference may have, in points.
DIFFERENCE_ENDS = (1, 2, 5, 10, 20, 50, 100)


def visible(text: str) -> str:
    """The text with characters that reorder or hide it spelled out, such as `[U+202E]`.

    Args:
        text: Anything, lone surrogates too.

    Returns:
        Text that a browser shows in the order it is stored, and that UTF-8 can hold.
    """
    return _DECEPTIVE.sub(lambda match: f"[U+{ord(match[0]):04X}]", text.replace("\r\n", "\n"))


def script_json(value: object) -> Markup:
    """JSON that is safe inside a script element: no `<`, `>` or `&` is left in it.

    Args:
        value: Anything JSON can hold; NaN is refused.

    Returns:
        Markup to put between the tags as it is.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704


def sample_rows(files: RunFiles, models: list[str]) -> list[Row]:
    """One row a prompt for the sample table, its texts already made visible.

    Keys are short since they stand ten thousand times in the page: i id, c category, p prompt, r reference, and
    m, in the models' order: t responses (one a sample), v verdicts as [sample, repeat, state, score, raw or cause,
    disagreement of a jury's members]. Where there are thoughts: h of the reference, and in m one for each response.

    Args:
        files: The run directory's content.
        models: Order of the models.

    Returns:
        Rows in the test set's order.
    """
    categories = categories_of(files)
    rows: dict[str, Row] = {
        name: {
            "i": visible(name),
            "c": visible(categories.get(name, "")),
            "p": "",
            "r": "",
            "m": [_cell() for _ in models],
        }
        for name in asked_ids(files)
    }
    for index, model in enumerate(models):
        for (name, _), response in sorted(files.responses.get(model, {}).items()):
            row = rows[name]
            row["p"] = row["p"] or visible(_prompt_text(files.test.get(name, response)))
            row["r"] = row["r"] or visible(str(response.get("reference") or ""))
            row["m"][index]["t"].append(visible(_response_text(response)))
            if response.get("thought"):
                # One for each response up to this one; those after it may have none.
                thoughts = row["m"][index].setdefault("h", [])
                thoughts += [""] * (len(row["m"][index]["t"]) - 1 - len(thoughts))
                thoughts.append(visible(str(response["thought"])))
        for (name, sample, repeat), verdict in sorted(files.verdicts.get(model, {}).items()):
            words = verdict.get("raw") if verdict["state"] == "scored" else verdict.get("cause")
            rows[name]["m"][index]["v"].append(
                [
                    sample,
                    repeat,
                    verdict["state"],
                    verdict.get("score"),
                    visible(str(words or "")),
                    _disagreement(verdict),
                ]
            )
    for name, test in files.test.items():
        rows[name]["p"] = rows[name]["p"] or visible(_prompt_text(test))
        rows[name]["r"] = rows[name]["r"] or visible(str(test.get("reference") or ""))
        if test.get("reference_thought"):
            rows[name]["h"] = visible(str(test["reference_thought"]))
    return list(rows.values())


def _disagreement(verdict: Row) -> float:
    """The highest minus the lowest score that a jury's members gave; 0 for a judge alone."""
    members = (verdict.get("details") or {}).get("members") or {}
    scores = [score for score in members.values() if score is not None]
    return max(scores) - min(scores) if scores else 0


def _cell() -> Row:
    return {"t": [], "v": []}


def _prompt_text(row: Row) -> str:
    """What the user wrote: the messages where there are some, without the template's words around them."""
    messages = row.get("messages")
    if not messages:
        return str(row.get("prompt") or "")
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in messages)


def _response_text(row: Row) -> str:
    text = row.get("response")
    if text is None:
        return f"[no response: {row.get('cause') or row.get('state') or 'unknown cause'}]"
    return str(text) + (" [cut at the token limit]" if row.get("finish_reason") == "length" else "")


def render_html(numbers: dict[str, Any], files: RunFiles) -> str:
    """The page.

    Args:
        numbers: Of report.json.
        files: The run directory's content, for samples and configuration.

    Returns:
        One HTML document that needs no network.
    """
    models = files.models()
    rows = sample_rows(files, models)
    script = _resource("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment(autoescape=True)
        .from_string(_resource("report.html"))
        .render(
            **numbers,
            curve_charts=curve_charts(numbers["curves"]),
            difference_chart=difference_chart(numbers["headline"]["difference"]),
            examples=_examples(numbers, files, rows),
            model_names=models,
            sample_data=script_json({"models": models, "rows": rows}),
            config_text=visible(files.config),
            style=Markup(_resource("report.css")),  # noqa: S704
            script=Markup(script),  # noqa: S704
            script_digest=digest,
        )
    )


def _examples(numbers: dict[str, Any], files: RunFiles, rows: list[Row]) -> dict[str, list[Row]]:
    by_id = dict(zip(asked_ids(files), rows, strict=True))
    return {kind: [by_id[name] for name in names] for kind, names in numbers["samples"].items()}


def render_markdown(numbers: dict[str, Any], files: RunFiles) -> str:
    """The summary for a pull request, with a few answers.

    Args:
        numbers: Of report.json.
        files: The run directory's content, for the answers.

    Returns:
        GitHub-flavoured Markdown.
    """
    models = files.models()
    examples = _examples(numbers, files, sample_rows(files, models))
    template = _environment(autoescape=False).from_string(_resource("report.md.j2"))
    return template.render(**numbers, model_names=models, examples=examples)


def _resource(name: str) -> str:
    return package_files("evaluation.report").joinpath(name).read_text(encoding="utf-8")


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        autoescape=autoescape,  # noqa: S701 (Markdown has its own escaping, the filter `cell`)
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        interval=interval_text,
        signed=signed_text,
        short=short_text,
        visible=lambda value: visible(str(value)),
        cell=markdown_cell,
        number=number_text,
        percent=lambda share: f"{100 * share:.1f}%",
        duration=duration_text,
        flat=flatten,
    )
    return environment


def markdown_cell(value: object) -> str:
    """Text for a Markdown table cell: nothing in it is markup, a table edge, a mention or a line break.

    Args:
        value: Anything.

    Returns:
        One line.
    """
    text = re.sub(r"\s+", " ", visible(str(value))).strip()
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~@-])", r"\\\1", text)


def short_text(text: str) -> str:
    """The beginning of a prompt or an answer as one line, as the page's titles show it.

    Args:
        text: Any.

    Returns:
        At most 160 characters; the heading over an Alpaca row's input, the template's word, has become a dot.
    """
    line = " ".join(_HEADING.sub(" \N{MIDDLE DOT} ", text).split())
    return line if len(line) <= MAX_MARKDOWN_CHARS else line[:MAX_MARKDOWN_CHARS] + "\N{HORIZONTAL ELLIPSIS}"


def number_text(value: object) -> str:
    """A number for people: thousands set apart, three significant digits below a thousand, a dash for nothing.

    Args:
        value: A number or None; anything else is returned as text.

    Returns:
        The text.
    """
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return visible(str(value))
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def signed_text(value: float) -> str:
    """Such as `+3.2`, or with a real minus sign.

    Args:
        value: Points.

    Returns:
        The text, with one digit after the point.
    """
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def duration_text(seconds: float | None) -> str:
    """Such as `42 s`, `3 min 05 s`, `2 h 10 min`.

    Args:
        seconds: A duration or None.

    Returns:
        The text; a dash for nothing.
    """
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def flatten(value: object, prefix: str = "") -> list[tuple[str, object]]:
    """Nested dictionaries to (dotted key, value), for a two-column table.

    Args:
        value: A JSON-able value.
        prefix: Key of the value itself.

    Returns:
        One pair a leaf; lists are shown as JSON.
    """
    if isinstance(value, dict):
        return [
            pair for key, inner in value.items() for pair in flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        return [(prefix, json.dumps(value, ensure_ascii=False))]
    return [(prefix, value)]


def difference_chart(estimate: dict[str, Any]) -> dict[str, float] | None:
    """A difference and its interval on an axis with zero in the middle.

    Args:
        estimate: mean, low and high, in points.

    Returns:
        `end`, the axis's right end in points, and `mean`, `low`, `high` as percentages of its width; None without a
        mean. Without an interval low and high are the mean.
    """
    mean = estimate["mean"]
    if mean is None:
        return None
    low = mean if estimate["low"] is None else estimate["low"]
    high = mean if estimate["high"] is None else estimate["high"]
    farthest = max(abs(mean), abs(low), abs(high))
    end = next((end for end in DIFFERENCE_ENDS if end >= farthest), DIFFERENCE_ENDS[-1])
    at = {name: round(50 + 50 * value / end, 2) for name, value in (("mean", mean), ("low", low), ("high", high))}
    return {"end": end} | at


def curve_charts(curves: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """The training curves, laid out: coordinates in 0..100 of a plot's width and height, y downwards.

    Args:
        curves: Of report.json.

    Returns:
        One chart a measure: title, lines (name, and path per x axis), ticks.
    """
    charts = []
    measures = [
        ("loss", "Loss per target token", True),
        ("lr", "Learning rate", False),
        ("grad_norm", "Gradient norm", False),
        ("tokens_per_s", "Tokens per second", False),
    ]
    for key, title, has_validation in measures:
        lines = {"train": curves["train"], "validation": curves["validation"] if has_validation else []}
        chart = _chart(key, title, lines)
        if chart:
            charts.append(chart)
    return charts


def _chart(key: str, title: str, lines: dict[str, list[Row]]) -> dict[str, Any] | None:
    values = [row[key] for rows in lines.values() for row in rows if row.get(key) is not None]
    if not values:
        return None
    low, high = (0.0, max(values)) if min(values) >= 0 else (min(values), max(values))
    high = high if high > low else low + 1
    axes = []
    for x_key, x_title in (("step", "steps"), ("total_tokens", "tokens"), ("epoch", "epochs")):
        xs = [row[x_key] for rows in lines.values() for row in rows if row.get(x_key) is not None]
        right = max(xs, default=0) or 1
        paths = {name: _points(rows, x_key, key, right, (low, high)) for name, rows in lines.items() if rows}
        axes.append({"key": x_key, "title": x_title, "right": right, "paths": paths})
    return {"key": key, "title": title, "low": low, "high": high, "axes": axes}


def _points(rows: list[Row], x_key: str, y_key: str, right: float, y_range: tuple[float, float]) -> list[str]:
    """`x,y` of each point; a long curve is averaged over equal runs of steps."""
    known = [(row[x_key], row[y_key]) for row in rows if row.get(x_key) is not None and row.get(y_key) is not None]
    run = -(-len(known) // MAX_CURVE_POINTS)
    low, high = y_range
    points = []
    for start in range(0, len(known), run or 1):
        part = known[start : start + run]
        x = sum(p[0] for p in part) / len(part) / right * 100
        y = 100 - (sum(p[1] for p in part) / len(part) - low) / (high - low) * 100
        points.append(f"{x:.2f},{y:.2f}")
    return points
