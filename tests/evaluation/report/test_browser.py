"""The page in a real browser: opens, searches, filters, sorts, prints, and runs nothing that a model wrote.

Chromium is driven through Playwright (`apt-get install chromium`, `pip install playwright`; no browser download).
"""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from evaluation.config import ReportConfig
from evaluation.report.build import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is not installed")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium on PATH (apt-get install chromium)", allow_module_level=True)

_synthetic = runpy.run_path(str(Path(__file__).parent / "synthetic.py"))
make_run, HOSTILE = _synthetic["make_run"], _synthetic["HOSTILE"]
ARGUMENTS = [
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """300 rows with hostile text, two verdicts each."""
    run = make_run(tmp_path_factory.mktemp("small"), num_rows=300, repeats=2)
    write_report(ReportConfig(bootstrap_samples=500), run)
    return run / "report.html"


@pytest.fixture(scope="module")
def big_report(tmp_path_factory):
    """10,000 rows with 1 kB in each of two responses."""
    run = make_run(tmp_path_factory.mktemp("big"), num_rows=10_000, num_filler_chars=1000)
    write_report(ReportConfig(bootstrap_samples=100), run)
    return run / "report.html"


@pytest.fixture
def page(browser, report):
    """The small report, with everything recorded that should not happen."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.trouble = []
    page.on("pageerror", lambda error: page.trouble.append(f"error: {error}"))
    page.on("console", lambda message: page.trouble.append(f"console: {message.text}"))
    page.on("dialog", lambda dialog: page.trouble.append("dialog"))
    page.on("request", lambda request: request.url.startswith("file:") or page.trouble.append(f"request {request.url}"))
    page.goto(report.as_uri())
    yield page
    context.close()


def changes(page):
    """The differences that the shown rows name, as numbers."""
    texts = page.locator("#rows .change").all_inner_texts()
    return [None if text == "no score" else float(text.replace("\u2212", "-")) for text in texts]


def open_first(page):
    """Open the first row and wait for what it holds."""
    page.locator("#rows summary").first.click()
    page.locator("#rows .detail").first.wait_for()


def test_opens_with_the_headline_and_without_trouble(page):
    assert page.title().startswith("small")
    assert page.locator("#headline .figure").inner_text().startswith("+6")
    assert page.locator("#rows details").count() == 25
    assert "300 prompts" in page.locator("#count").inner_text()
    assert page.trouble == []


def test_search_finds_prompts_answers_and_the_judges_words(page):
    page.fill("#search", "number 2093.")  # row 299
    assert page.locator("#count").inner_text() == "1 of 300 prompts"
    assert "row-00299" in page.locator("#rows").inner_text()
    page.fill("#search", "THE WORD IS 2093")  # only in the reference and the tuned answer
    assert page.locator("#rows details").count() == 1
    page.fill("#search", "no such text anywhere")
    assert page.locator("#rows details").count() == 0
    assert page.locator("#more").is_hidden()
    page.fill("#search", "")
    assert page.locator("#rows details").count() == 25


def test_filters_narrow_and_combine(page):
    page.select_option("#category", "count")
    assert page.locator("#count").inner_text() == "60 of 300 prompts"
    page.select_option("#category", "")
    page.select_option("#outcome", "unscored")
    assert page.locator("#count").inner_text() == "5 of 300 prompts"  # rows 96, 100, 193, 201, 290
    page.fill("#search", "row-00096")
    assert page.locator("#rows details").count() == 1
    open_first(page)
    assert "judge failed: no integer in the verdict" in page.locator("#rows").inner_text()


def test_sorts_by_difference_and_by_spread(page):
    page.select_option("#sort", "up")
    up = changes(page)
    assert up == sorted(up, reverse=True)
    page.select_option("#sort", "down")
    down = changes(page)
    assert down == sorted(down) and down[0] < up[-1]
    page.select_option("#sort", "order")
    assert "row-00000" in page.locator("#rows details").first.inner_text()
    page.select_option("#sort", "spread")
    open_first(page)
    verdicts = page.locator("#rows details").first.locator(".box.tuned .verdict").all_inner_texts()
    assert len(verdicts) == 2  # both repeats, with the judge's words
    assert all("Rating" in verdict for verdict in verdicts)


def test_sorts_by_the_disagreement_of_a_jury(browser, tmp_path):
    run = make_run(tmp_path / "run", num_rows=12)
    path = run / "scores/tuned.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    apart = {3: (10, 95), 7: (40, 60)}  # what two members said of these rows
    for number, row in enumerate(rows):
        row["details"] = {"members": dict(zip(("one", "two"), apart.get(number, (50, 50)), strict=True))}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_report(ReportConfig(bootstrap_samples=100), run)
    page = browser.new_page()
    page.goto((run / "report.html").as_uri())
    page.select_option("#sort", "disagreement")
    shown = page.locator("#rows .meta").all_inner_texts()
    assert shown[0].startswith("row-00003") and shown[1].startswith("row-00007")
    page.close()


def test_the_table_and_the_headline_tell_the_same(page, report):
    headline = json.loads(report.with_name("report.json").read_text(encoding="utf-8"))["headline"]
    while page.locator("#more").is_visible():
        page.click("#more")
    known = [change for change in changes(page) if change is not None]
    assert len(known) == headline["num_prompts"]
    assert sum(known) / len(known) == pytest.approx(headline["difference"]["mean"], abs=0.05)


def test_more_rows_come_on_demand(page):
    page.click("#more")
    assert page.locator("#rows details").count() == 50
    assert page.locator("#more").inner_text() == "Show more (250 left)"


def test_a_row_shows_both_answers_with_their_difference_marked(page):
    page.fill("#search", "row-00011")
    open_first(page)
    assert page.locator(".box.base mark").all_inner_texts() == [" 11"]
    assert page.locator(".box.tuned mark").all_inner_texts() == [" 77"]
    assert "the word is 77" in page.locator(".detail").inner_text()


def test_no_text_of_the_data_becomes_markup_or_script(page):
    page.select_option("#sort", "order")
    while page.locator("#more").is_visible():
        page.click("#more")
    page.evaluate("document.querySelectorAll('#rows details').forEach((row) => { row.open = true; })")
    page.wait_for_function("document.querySelectorAll('#rows .detail').length === 300")
    shown = page.locator("#rows").inner_text()
    for text in HOSTILE[:4]:
        assert text in shown
    assert "[U+202E]" in shown and "\u202e" not in shown
    assert page.evaluate("window.pwned") is None
    assert page.locator("#rows img, #rows script, #rows b b, main img").count() == 0
    assert page.locator("script").count() == 2
    assert page.trouble == []


def test_the_policy_stops_a_script_that_got_in_after_all(page):
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned = 9\">')")
    page.evaluate("const s = document.createElement('script'); s.text = 'window.pwned = 8'; document.body.append(s)")
    page.wait_for_timeout(200)
    assert page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in trouble for trouble in page.trouble)


def test_columns_sort_by_keyboard_and_stay_in_sight(page):
    difference = page.locator(".columns button", has_text="Difference")
    difference.focus()
    page.keyboard.press("Enter")  # from the most changed on to the largest gain
    assert page.locator("#sort").input_value() == "up"
    assert difference.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Enter")
    down = changes(page)
    assert page.locator("#sort").input_value() == "down" and down == sorted(down)
    page.locator("#rows details").nth(20).scroll_into_view_if_needed()
    page.mouse.wheel(0, 400)
    page.wait_for_function("window.scrollY > 1000")
    tops = page.evaluate("['#search', '.columns'].map((it) => document.querySelector(it).getBoundingClientRect().top)")
    assert all(0 <= top < 70 for top in tops)


def test_titles_leave_the_templates_words_out(browser, tmp_path):
    run = make_run(tmp_path / "run", num_rows=3)
    path = run / "data/test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[0]["messages"][0]["content"] = "Sort the words.\n\n### Input:\npear apple"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_report(ReportConfig(bootstrap_samples=100), run)
    page = browser.new_page()
    page.goto((run / "report.html").as_uri())
    page.select_option("#sort", "order")
    assert page.locator("#rows .ask").first.inner_text() == "Sort the words. \u00b7 pear apple"
    page.close()


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_is_wider_than_the_screen(browser, report, width):
    page = browser.new_page(viewport={"width": width, "height": 780})
    page.goto(report.as_uri())
    open_first(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_curves_switch_their_axis(page):
    assert page.locator(".plot.step").first.is_visible()
    page.locator("label[for=axis-total_tokens]").click()
    assert not page.locator(".plot.step").first.is_visible()
    assert "9,800,000 tokens" in page.locator(".plot.total_tokens").first.inner_text()


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_overflows_sideways(browser, report, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(report.as_uri())
    open_first(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def contrast(page, selector):
    """WCAG contrast of an element's text with the nearest opaque background behind it."""
    return page.evaluate(
        """(selector) => {
          const light = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).map((v) => v / 255)
              .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          let element = document.querySelector(selector);
          const ink = light(getComputedStyle(element).color);
          const behind = () => getComputedStyle(element).backgroundColor;
          while (behind() === "rgba(0, 0, 0, 0)") element = element.parentElement;
          const ground = light(behind());
          return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
        }""",
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser, report, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(report.as_uri())
    for selector in (
        ".words",
        ".range",
        ".figure",
        ".facts dt",
        ".notice li",
        "#rows .meta",
        ".change.better",
        "h2",
        ".finding",
        ".columns button",
    ):
        assert contrast(page, selector) >= 4.5, selector
    page.close()


def test_paper_shows_examples_instead_of_controls(browser, report):
    page = browser.new_page()
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert not page.locator("#search").is_visible()
    assert page.locator(".example").first.is_visible()
    assert page.locator(".example").count() == 60
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()


def test_without_scripts_the_examples_are_there(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator(".example").first.is_visible()
    assert not page.locator("#search").is_visible()
    assert page.locator("#headline .figure").is_visible()
    context.close()


def test_ten_thousand_hostile_rows_are_searched_sorted_and_printed(browser, big_report):
    """How fast is measured by tests/benchmarks/report_speed.py."""
    page = browser.new_page()
    page.goto(big_report.as_uri())
    assert page.locator("#count").inner_text() == "10,000 prompts"
    assert page.locator("#rows details").count() == 25  # the rest comes on demand
    for words, count in (("number 69993.", "1 of"), ("zzz", "0 of"), ("", "10,000 prompts")):
        page.fill("#search", words)
        assert page.locator("#count").inner_text().startswith(count)
    page.fill("#search", "<img src=x onerror")
    assert 0 < page.locator("#rows details").count() <= 25
    page.select_option("#sort", "down")
    down = changes(page)
    assert down == sorted(down)
    open_first(page)
    assert page.evaluate("window.pwned") is None and page.locator("#rows img").count() == 0
    page.emulate_media(media="print")
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
