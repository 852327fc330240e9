"""The page at / in headless Chromium, against a server. DLLM_SCREENSHOT=file.png keeps a picture of it."""

from __future__ import annotations

import os
import shutil
import time

import pytest
from serving import PROMPT

sync_api = pytest.importorskip("playwright.sync_api")
from trt_runtime.config import GenerationConfig  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# how many cells are masked, and how many stand in the running block, after each change of the canvas
WATCH = """new MutationObserver(() => (window.seen ??= []).push([document.querySelectorAll('.cell.mask').length,
  document.querySelectorAll('.cell.running').length])).observe(document, {subtree: true, childList: true, attributes: true})"""
# press the button as soon as the canvas is there
STOP = """new MutationObserver((_, observer) => { if (document.querySelector('.cell.running')) { observer.disconnect();
  document.getElementById('send').click(); } }).observe(document, {subtree: true, childList: true, attributes: true})"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        flags = [
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, demo):
    """The page, opened; at the end it must have had no error and asked no one but its server."""
    page = browser.new_page(viewport={"width": 1000, "height": 760})
    wrong, asked = [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.add_init_script(WATCH)
    page.goto(demo[0])
    yield page
    page.close()
    assert not wrong and asked and all(url.startswith(demo[0]) for url in asked)


def _ask(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def test_masks_turn_into_text_block_by_block(page, model):
    expected = model.generate([PROMPT], GenerationConfig())[0]
    _ask(page, PROMPT)
    page.wait_for_selector(".facts .bar")
    assert page.text_content(".turn:not(.user) .text") == expected.text
    seen = page.evaluate("window.seen")
    masks = [masked for masked, running in seen if running]
    assert masks[0] > 80 and masks == sorted(masks, reverse=True) and len(set(masks)) > 3  # fewer and fewer, never back
    assert {running for _, running in seen if running} == {model.manifest.decoding.defaults["block_length"]}
    colours = page.eval_on_selector_all(".cell", "cells => cells.map(cell => getComputedStyle(cell).backgroundColor)")
    assert len(set(colours)) > 3
    facts = page.text_content(".turn .facts")
    assert f"{expected.nfe} forwards (NFE)" in facts and "tokens/s" in facts and "vanilla decoding: 96 forwards" in facts
    assert page.text_content("#model").startswith("demo")
    if os.environ.get("DLLM_SCREENSHOT"):
        page.screenshot(path=os.environ["DLLM_SCREENSHOT"])


def test_errors_are_shown_and_the_next_question_is_answered(page):
    page.fill("#length", "100000")
    _ask(page, "clean hall with mop")
    page.wait_for_selector(".error")
    assert "more than the model" in page.text_content(".error")
    page.fill("#length", "")
    page.select_option("#cache", "none")
    page.fill("#threshold", "0.5")
    _ask(page, "clean hall with mop")
    page.wait_for_selector(".facts .bar")


def test_text_is_never_markup(page):
    _ask(page, "<img src=x onerror=alert(1)> clean hall")
    page.wait_for_selector(".facts .bar")
    assert page.locator(".turn img").count() == 0 and page.text_content(".turn.user").startswith("<img")


def test_stop_gives_up_the_answer(page, demo, model, monkeypatch):
    whole = model.backend.prefix
    monkeypatch.setattr(model.backend, "prefix", lambda *args, **options: (time.sleep(0.02), whole(*args, **options))[1])
    page.select_option("#cache", "none")
    page.fill("#threshold", "1")
    page.evaluate(STOP)
    _ask(page, PROMPT)
    page.wait_for_selector(".cell.mask")
    page.wait_for_selector("#send:text('Send')")
    assert page.locator(".facts .bar").count() == 0 and page.locator(".cell.mask").count() > 0
    page.wait_for_timeout(200)
    assert demo[1].num_open == 0
