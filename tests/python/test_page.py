"""The status page in a headless browser, against a running blockplane.

    BLOCKPLANE_URL=http://127.0.0.1:8000 BLOCKPLANE_BROWSER=/usr/bin/chromium \\
        python -m pytest tests/python/test_page.py

Needs the packages pillow, playwright and pytest, and Chromium. Makes no assumption about what the model says.
"""

import io
import os
import re
import urllib.parse

import pytest

URL = os.environ.get("BLOCKPLANE_URL", "http://127.0.0.1:8000").rstrip("/")
BROWSER = os.environ.get("BLOCKPLANE_BROWSER")
LIMIT_MS = 30_000

if not BROWSER:
    pytest.skip("BLOCKPLANE_BROWSER names no Chromium", allow_module_level=True)

from PIL import Image  # noqa: E402
from playwright.sync_api import expect, sync_playwright  # noqa: E402


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Without a sandbox: as root there is none to be had, and the page is our own.
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """The page, loaded and ready. What it complained of or asked of others fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, color_scheme="light")
    opened = context.new_page()
    opened.set_default_timeout(LIMIT_MS)
    complaints, asked = [], []
    opened.on("console", lambda message: complaints.append(message.text) if is_fault(message) else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(f"{URL}/")
    expect(opened.locator("#health")).to_have_text("ready", timeout=LIMIT_MS)
    yield opened
    context.close()
    assert not complaints
    here = urllib.parse.urlsplit(URL).netloc
    assert {urllib.parse.urlsplit(url).netloc for url in asked} == {here}


def is_fault(message):
    """Whether a line of the console tells of a fault; a refused request is none."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def ask(page, prompt, tokens=24):
    page.fill("#prompt", prompt)
    page.fill("#tokens", str(tokens))


def test_a_click_streams_an_answer_and_says_what_it_cost(page):
    ask(page, "Tell me in a few words what a block of a key-value cache is, please.")
    before = page.locator("#requests tr").count()
    page.click("#send")
    expect(page.locator("#cost")).to_contain_text("prompt tokens", timeout=LIMIT_MS)
    expect(page.locator("#cost")).to_contain_text("first token")
    assert page.inner_text("#answer") != ""
    # The table and the tiles follow.
    expect(page.locator("#requests tr")).to_have_count(min(before + 1, 12), timeout=LIMIT_MS)
    expect(page.locator("#tiles")).to_contain_text("Requests served")
    bars = page.locator("#workers .bar")
    assert bars.count() >= 1
    assert re.search(r"of [\d,]+ blocks", bars.first.get_attribute("aria-label"))


def test_the_page_works_without_a_mouse(page):
    # The first stop leads past the header, the last ones are reached by Tab alone.
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("Say a word.")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#cost")).to_contain_text("prompt tokens", timeout=LIMIT_MS)
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"tokens", "send", "answer"} <= reached


def test_what_the_server_refuses_is_shown(page):
    ask(page, "word " * 40_000)
    page.click("#send")
    expect(page.locator("#answer")).to_have_class("failed", timeout=LIMIT_MS)
    expect(page.locator("#answer")).to_contain_text("accepted")
    expect(page.locator("#send")).to_be_enabled()


def test_light_and_dark_look_different_and_neither_is_empty(page, tmp_path):
    ask(page, "One more, so that there is something to see.")
    page.click("#send")
    expect(page.locator("#cost")).to_contain_text("prompt tokens", timeout=LIMIT_MS)
    brightness = {}
    for theme in ("light", "dark"):
        page.select_option("#theme", theme)
        page.wait_for_timeout(400)
        image = Image.open(io.BytesIO(page.screenshot(path=tmp_path / f"{theme}.png")))
        pixels = image.convert("L").tobytes()
        brightness[theme] = sum(pixels) / len(pixels)
        # Text, bars and lines: an empty page has a handful of values.
        assert len(set(pixels)) > 40, theme
    assert brightness["light"] > 200 and brightness["dark"] < 80, brightness
    # Chosen once, kept.
    page.reload()
    expect(page.locator("#health")).to_have_text("ready", timeout=LIMIT_MS)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_narrow_window_needs_no_sideways_scrolling(page):
    page.set_viewport_size({"width": 380, "height": 800})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
