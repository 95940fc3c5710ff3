"""The page in a real browser: what a person types, sees and reads."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
PICTURES = "document.querySelectorAll('figure[data-done]').length"


def test_a_prompt_becomes_a_picture_of_each_model_side_by_side(shared: Any, tmp_path: Path) -> None:
    with Browser(f"{shared.url}/?prompt=a+blue+star&seed=3&all=1&num_inference_steps=6") as browser:
        browser.wait_for(f"{PICTURES} == 2")
        browser.wait_for("document.querySelector('figcaption span').textContent.includes('seed 3')")
        same = browser.run("new Set(Array.from(document.images, image => image.src)).size")
        assert same == 1, "both models are the same bundle here"
        assert browser.run("document.images[0].naturalWidth") == 32
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 5000


def test_previews_are_seen_on_the_way_and_it_can_be_stopped(shared: Any) -> None:
    with Browser(shared.url) as browser:
        browser.wait_for("models.length == 2")
        browser.run("form.prompt.value = 'a'; form.num_inference_steps.value = 150; form.requestSubmit()")
        browser.wait_for("document.querySelector('progress').value > 60 && document.images[0].src != ''")
        browser.run("stop.click()")
        browser.wait_for("document.querySelector('figcaption .bad')")
        assert browser.run("document.querySelector('figcaption .bad').textContent") == "stopped"
        end = time.monotonic() + 5
        while not shared.batcher.is_idle:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_what_is_refused_is_said_where_the_picture_would_be(shared: Any) -> None:
    with Browser(shared.url) as browser:
        browser.wait_for("models.length == 2")
        browser.run("form.prompt.value = 'a'; form.size.value = '30x32'; form.requestSubmit()")
        browser.wait_for("document.querySelector('figcaption .bad')")
        said = browser.run("document.querySelector('figcaption .bad').textContent")
        assert said == "width should be a multiple of 4, not 30; near are 28, 32"


def test_a_key_is_asked_for_and_used(start: Any) -> None:
    running = start(api_keys=("secret",))
    with Browser(running.url) as browser:
        browser.wait_for("!document.getElementById('key').hidden")
        assert "API key" in browser.run("problem.textContent")
        browser.run("form.key.value = 'secret'; form.key.dispatchEvent(new Event('change'))")
        browser.wait_for("models.length == 1")
        browser.run("form.prompt.value = 'a'; form.requestSubmit()")
        browser.wait_for(f"{PICTURES} == 1")
