"""The page at / in headless Chromium, against a server. DLLM_SCREENSHOT=file.png keeps a picture of it."""

from __future__ import annotations

import os
import shutil
import time
import types

import pytest
from serving import PROMPT, serving

sync_api = pytest.importorskip("playwright.sync_api")
from trt_runtime.decoding.config import GenerationConfig  # noqa: E402
from trt_runtime.errors import DllmError  # noqa: E402
from trt_runtime.model import load  # noqa: E402
from trt_runtime.serving.process import examples  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# how many cells are masked, and how many stand in the running block, after each change of the canvas
WATCH = """new MutationObserver(() => (window.seen ??= []).push([
  document.querySelectorAll('.cell.mask').length,
  document.querySelectorAll('.cell.running').length,
])).observe(document, {subtree: true, childList: true, attributes: true})"""
# press the button as soon as the canvas is there
STOP = """new MutationObserver((_, observer) => {
  if (document.querySelector('.cell.running')) {
    observer.disconnect();
    document.getElementById('send').click();
  }
}).observe(document, {subtree: true, childList: true, attributes: true})"""


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
    # fewer and fewer, never back (how many of the forwards are seen depends on how fast the page reads them)
    assert 0 < masks[0] < 96 and masks == sorted(masks, reverse=True) and len(set(masks)) > 1
    assert {running for _, running in seen if running} == {model.manifest.decoding.defaults["block_length"]}
    colours = page.eval_on_selector_all(
        ".cell", "cells => cells.map(cell => getComputedStyle(cell).backgroundColor)"
    )
    assert len(set(colours)) > 3
    facts = page.text_content(".turn .facts")
    assert f"{expected.nfe} forwards (NFE)" in facts and "tokens/s" in facts
    vanilla = model.generate([PROMPT], GenerationConfig(cache="none", policy="fixed"))[0].nfe
    assert vanilla < 96 and f"vanilla decoding: {vanilla} forwards" in facts
    assert f"each of the {vanilla} tokens" in page.get_attribute(".turn .facts", "title")
    assert page.text_content("#model").startswith("demo")
    if os.environ.get("DLLM_SCREENSHOT"):
        page.screenshot(path=os.environ["DLLM_SCREENSHOT"])


def test_the_examples_that_the_page_offers_are_answered_right(browser, model, demo_artifact):
    """Those of the artifact's own checkpoint; a click asks one. Each answer is a right spelling of the plan
    that the order means."""
    import demo_prompts
    import demo_task

    plans = {example.prompt: example.plan for example in demo_prompts.held_out(100)}
    with serving(model, examples=examples(demo_artifact, None)) as (url, _):
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#examples button")
        prompts = page.locator("#examples button").all_text_contents()
        assert len(prompts) == 3
        for number, prompt in enumerate(prompts):
            page.click(f"#examples button >> nth={number}")
            page.wait_for_selector(f".facts .bar >> nth={number}")
            page.wait_for_selector("#send:text('Send')")
            assert page.locator(".turn.user").nth(number).text_content() == prompt
            assert demo_task.is_right(
                page.locator(".turn:not(.user) .text").nth(number).text_content(), plans[prompt]
            ), prompt
        page.close()


def test_blocks_with_exact_caches_are_shown_as_the_model_decodes_them(browser, block_causal_demo):
    """The same page for a model with block-causal attention: its blocks are aligned to the prompt's start, so
    the first and the last may be short."""
    with load(block_causal_demo, "ort", threads=1) as model, serving(model) as (url, _):
        expected = model.generate([PROMPT], GenerationConfig())[0]
        page = browser.new_page()
        page.add_init_script(WATCH)
        page.goto(url)
        _ask(page, PROMPT)
        page.wait_for_selector(".facts .bar")
        assert page.text_content(".turn:not(.user) .text") == expected.text
        running = [count for _, count in page.evaluate("window.seen") if count]
        assert running and max(running) == model.manifest.decoding.block_length
        assert f"{expected.nfe} forwards (NFE)" in page.text_content(".turn .facts")
        assert page.locator("#cache option").all_text_contents() == ["model's", "none", "block"]
        page.select_option("#cache", "none")
        _ask(page, PROMPT)
        page.wait_for_selector(".facts .bar >> nth=1")
        assert page.locator(".turn:not(.user) .text").nth(1).text_content() == expected.text
        page.close()


def test_examples_come_from_a_file_or_are_none(demo_artifact, tmp_path, monkeypatch):
    given = tmp_path / "given.txt"
    given.write_text("one\n" + "long " * 300 + "\ntwo\n\nthree\nfour\n")
    assert examples(demo_artifact, given) == ("one", "two", "three")
    with pytest.raises(DllmError, match="cannot be read"):
        examples(demo_artifact, tmp_path / "missing.txt")
    source = tmp_path / "checkpoint"
    for text, expected in (
        (None, ()),
        (b"one\n", ("one",)),
        (b"\xff\xfe", ()),
        (b"", ()),
        (b"one\n" * 100_000, ()),
    ):
        source.mkdir(exist_ok=True)
        if text is not None:
            (source / "prompts.txt").write_bytes(text)
        held = types.SimpleNamespace(source={"checkpoint": str(source)})
        monkeypatch.setattr("trt_runtime.serving.process.manifests.load", lambda path, held=held: held)
        assert examples(demo_artifact, None) == expected
    monkeypatch.setattr(
        "trt_runtime.serving.process.manifests.load", lambda path: types.SimpleNamespace(source={})
    )
    assert examples(demo_artifact, None) == ()


def test_a_server_without_examples_offers_none(page):
    page.wait_for_selector("#model:text('demo on')")
    assert page.locator("#examples button").count() == 0


def test_errors_are_shown_and_the_next_question_is_answered(page):
    _ask(page, "clean hall with mop " * 60)
    page.wait_for_selector(".error")
    assert "shorten the prompt" in page.text_content(".error")
    page.select_option("#cache", "none")
    page.fill("#threshold", "0.5")
    _ask(page, "clean hall with mop")
    page.wait_for_selector(".facts .bar")


def test_text_is_never_markup(page):
    _ask(page, "<img src=x onerror=alert(1)> clean hall")
    page.wait_for_selector(".facts .bar")
    assert page.locator(".turn img").count() == 0 and page.text_content(".turn.user").startswith("<img")


def test_stop_gives_up_the_answer(page, demo, model, monkeypatch):
    whole = model.backend.forward
    monkeypatch.setattr(
        model.backend, "forward", lambda *args, **options: (time.sleep(0.02), whole(*args, **options))[1]
    )
    page.select_option("#cache", "none")
    page.fill("#threshold", "1")
    page.evaluate(STOP)
    _ask(page, PROMPT)
    page.wait_for_selector(".cell.mask")
    page.wait_for_selector("#send:text('Send')")
    assert page.locator(".facts .bar").count() == 0 and page.locator(".cell.mask").count() > 0
    page.wait_for_timeout(200)
    assert demo[1].num_open == 0
