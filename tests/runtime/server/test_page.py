"""The page in a real browser: what a person types, drops, sees and reads."""

import base64
import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from browser import Browser
from chromium import CHROMIUM, Chromium
from firefox import FIREFOX, Firefox
from webkit import WEBKIT, WebKit

from obsdiff_runtime.masks import mask_of
from obsdiff_runtime.pictures import resized
from obsdiff_runtime.pipeline import Pipeline
from obsdiff_runtime.server import page
from obsdiff_runtime.server.options import Bounds, Limits

DONE = "document.querySelectorAll('figure[data-done] .deeds a').length"


BROWSERS = {
    "chromium": pytest.param(Chromium, marks=pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")),
    "firefox": pytest.param(Firefox, marks=pytest.mark.skipif(FIREFOX is None, reason="needs Firefox")),
    "webkit": pytest.param(WebKit, marks=pytest.mark.skipif(WEBKIT is None, reason="needs WebKitWebDriver and Xvfb")),
}


@pytest.fixture(scope="module", params=BROWSERS.values(), ids=BROWSERS)
def running_browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    with request.param() as found:
        yield found


@pytest.fixture
def browser(running_browser: Browser) -> Iterator[Browser]:
    """The one browser of all tests, in which nothing may break unseen."""
    yield running_browser
    assert running_browser.heard() == []


@pytest.fixture(scope="module")
def bundles(
    sd3_bundle: Path,
    flux2_pair: tuple[Any, Path],
    dit_pair: tuple[Any, Path],
    wan22_i2v_pair: tuple[Any, Path],
    wan_pair: tuple[Any, Path],
    controlnet_pair: tuple[Any, Path],
) -> dict[str, Path]:
    return {
        "model-0": sd3_bundle,
        "model-1": flux2_pair[1],
        "model-2": dit_pair[1],
        "model-3": wan22_i2v_pair[1],
        "model-4": wan_pair[1],
        "model-5": controlnet_pair[1],
    }


@pytest.fixture(scope="module")
def every(bundles: dict[str, Path], serving: Callable[..., Any]) -> Iterator[Any]:
    """One server of models that take different things."""
    with serving(*bundles.values()) as running:
        yield running


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    found = []
    for index, (height, width) in enumerate([(64, 96), (80, 64), (64, 64)]):
        pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        found.append(tmp_path / f"photo {index}.png")
        Image.fromarray(pixels).save(found[-1])
    return found


def open_at(browser: Browser, running: Any, model: str, **how: Any) -> None:
    browser.open(f"{running.url}/?model={model}", **how)
    browser.wait_for("models.length > 0")


def fill(browser: Browser, **fields: Any) -> None:
    for name, value in fields.items():
        browser.run(f"named({name!r}).value = {value!r}")


def shown(browser: Browser, index: int = 0) -> np.ndarray:
    """(height, width, 3) of a picture of the shelf, as the browser decoded it."""
    image = f"document.querySelectorAll('figure img')[{index}]"
    browser.wait_for(f"{image}.complete && {image}.naturalWidth")  # until then a preview of it is drawn
    script = f"firstFrame({image})"
    content = base64.b64decode(browser.run(script).partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def text(browser: Browser, selector: str) -> str:
    return str(browser.run(f"document.querySelector({selector!r}).textContent"))


def test_a_prompt_becomes_a_picture_of_each_model_side_by_side(shared: Any, browser: Browser, tmp_path: Path) -> None:
    browser.open(f"{shared.url}/?prompt=a+blue+star&seed=3&all=1&num_inference_steps=6")
    browser.wait_for(f"{DONE} == 2")
    assert "seed 3, image 1; 6 steps" in text(browser, "figcaption span")
    first, second = shown(browser, 0), shown(browser, 1)
    np.testing.assert_array_equal(first, second)  # both models are the same bundle here
    assert first.shape == (32, 32, 3)
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5000


def test_previews_are_seen_on_the_way_and_it_can_be_stopped(shared: Any, browser: Browser) -> None:
    open_at(browser, shared, "model-0")
    fill(browser, prompt="a", num_inference_steps=150, n=10)  # or it is done before the browser looks
    browser.run("form.requestSubmit()")
    browser.wait_for("document.querySelector('progress')?.value > 60 && document.images[0].src != ''")
    browser.run("stop.click()")
    browser.wait_for("document.querySelector('figcaption .bad')")
    assert text(browser, "figcaption .bad") == "stopped"
    end = time.monotonic() + 5
    while not shared.batcher.is_idle:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("model-0", ["negative_prompt", "image", "guidance_scale", "strength", "size"]),
        ("model-1", ["negative_prompt", "image", "guidance_scale", "size"]),
        ("model-2", ["image", "guidance_scale", "strength"]),
        ("model-3", ["negative_prompt", "image", "guidance_scale", "guidance_scale_2", "size", "num_frames"]),
        ("model-4", ["negative_prompt", "guidance_scale", "size", "num_frames"]),
        (
            "model-5",
            ["negative_prompt", "image", "control", "guidance_scale", "strength", "control_scale", "size"],
        ),
    ],
)
def test_a_field_is_there_where_the_model_takes_it(model: str, fields: list[str], every: Any, browser: Browser) -> None:
    open_at(browser, every, "model-3")  # which takes most
    browser.run(f"form.model.value = {model!r}; form.model.dispatchEvent(new Event('change'))")
    seen = browser.run("[...form.elements].filter(each => each.checkVisibility() && each.name).map(each => each.name)")
    always = ["prompt", "model", "seed", "num_inference_steps", "n"]
    assert sorted(seen) == sorted(always + fields)
    assert browser.run("document.getElementById('beside').hidden"), "there is no other that takes the same"
    formats = browser.run("[...form.output_format.options].map(each => each.value)")
    assert ("jpeg" in formats) == ("num_frames" not in fields)
    assert browser.run("named('prompt').tagName") == ("SELECT" if model == "model-2" else "TEXTAREA")


def test_a_class_is_chosen_by_its_name(every: Any, browser: Browser, bundles: dict[str, Path]) -> None:
    browser.open(f"{every.url}/?model=model-2&prompt=golden+retriever&seed=3")
    browser.wait_for(f"{DONE} == 1")
    ours = Pipeline(bundles["model-2"], threads=1)
    np.testing.assert_array_equal(shown(browser), ours("golden retriever", seed=3).arrays[0])
    names = browser.run("[...document.getElementById('class').options].map(each => each.text)")
    assert (names[0], names[1], names[207], len(names)) == ("Tinca tinca, tench", "1", "golden retriever", 1000)
    browser.open(f"{every.url}/?model=model-2&prompt=hamster")
    browser.wait_for("document.querySelector('label .bad')")
    assert text(browser, "label .bad") == "prompt: field required", "not a class that nobody asked for"


def test_pictures_are_chosen_dropped_and_taken_away_again(
    every: Any, browser: Browser, bundles: dict[str, Path], photos: list[Path]
) -> None:
    open_at(browser, every, "model-1")
    browser.choose_files("form.image", photos[2], photos[0])
    browser.wait_for("pictures.length == 2")
    browser.drop_files("drop", photos[1])
    browser.wait_for("pictures.length == 3")
    browser.run("document.querySelector('#thumbnails button').click()")
    browser.wait_for("[...document.querySelectorAll('#thumbnails img')].every(each => each.naturalWidth)")
    seen = browser.run("[...document.querySelectorAll('#thumbnails img')].map(each => each.alt)")
    assert seen == ["1: photo 0.png", "2: photo 1.png"]
    fill(browser, prompt="make it winter", seed=7, num_inference_steps=2)
    browser.run("form.requestSubmit()")
    browser.wait_for(f"{DONE} == 1")
    ours = Pipeline(bundles["model-1"], threads=1)
    references = [ours.fit(Image.open(photo)) for photo in photos[:2]]
    expected = ours("make it winter", reference=references, seed=7, num_inference_steps=2).arrays[0]
    np.testing.assert_array_equal(shown(browser), expected)
    browser.choose_files("form.image", *photos)
    browser.wait_for("document.querySelector('#drop .bad')")
    assert text(browser, "#drop .bad") == "5 pictures; at most 4 are taken"
    browser.run("form.model.value = 'model-3'; choose()")
    assert browser.run("pictures.length") == 2, "a film begins with one and ends with one"


def test_what_is_painted_over_a_picture_is_drawn_anew(
    every: Any, browser: Browser, bundles: dict[str, Path], photos: list[Path]
) -> None:
    open_at(browser, every, "model-0")
    browser.choose_files("form.image", photos[0])
    browser.wait_for("document.querySelector('canvas')?.width == 96")
    assert text(browser, "#pictures-are").startswith(
        "picture to change: choose, or drop here; paint over what is to be"
    )
    clear = "[...document.querySelectorAll('#thumbnails button')].find(each => each.textContent == 'change all of it')"
    fill(browser, prompt="a ring", seed=7, num_inference_steps=2)
    ours, size = Pipeline(bundles["model-0"], threads=1), every.client.get("/v1/models").json()["data"][0]
    width, height = (size["details"]["defaults"][side] for side in ("width", "height"))
    told = {"image": resized(Image.open(photos[0]), width, height), "seed": 7, "num_inference_steps": 2}
    for strength in (None, 0.5):
        assert not browser.run(f"{clear}.checkVisibility()"), "nothing is painted yet"
        browser.run("""(() => {
            const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
            for (const [kind, x, y] of [["down", .25, .5], ["move", .5, .5], ["move", .5, .75]])
                canvas.dispatchEvent(new PointerEvent("pointer" + kind, {pointerId: 1, buttons: 1, bubbles: true,
                    clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
        })()""")
        fill(browser, strength=strength or "")
        browser.run("form.requestSubmit()")
        browser.wait_for(f"{DONE} == 1")
        mask = browser.run("""painted(pictures[0]).then(blob => new Promise(done => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result);
            reader.readAsDataURL(blob);
        }))""")
        redrawn = mask_of(Image.open(io.BytesIO(base64.b64decode(mask.split(",")[1]))), width, height)
        assert 0.05 < redrawn.mean() < 0.5
        assert redrawn[height // 2, width // 4]
        assert redrawn[height * 3 // 4, width // 2]
        assert not redrawn[:, width * 3 // 4 :].any()
        np.testing.assert_array_equal(shown(browser), ours("a ring", mask=redrawn, strength=strength, **told).arrays[0])
        browser.run(f"{clear}.click()")
    browser.run("form.requestSubmit()")
    browser.wait_for(f"{DONE} == 1 && document.querySelector('figcaption span').textContent.includes('seed 7')")
    np.testing.assert_array_equal(shown(browser), ours("a ring", strength=0.5, **told).arrays[0])


def test_a_control_picture_steers(every: Any, browser: Browser, bundles: dict[str, Path], photos: list[Path]) -> None:
    open_at(browser, every, "model-5")
    browser.choose_files("form.control", photos[1])
    fill(browser, prompt="a ring", seed=7, num_inference_steps=2, control_scale=0.5)
    browser.run("form.requestSubmit()")
    browser.wait_for(f"{DONE} == 1")
    ours = Pipeline(bundles["model-5"], threads=1)
    own = ours.bundle.manifest.defaults
    control = resized(Image.open(photos[1]), own.width, own.height)
    expected = ours("a ring", control=control, control_scale=0.5, seed=7, num_inference_steps=2).arrays[0]
    np.testing.assert_array_equal(shown(browser), expected)


def test_a_file_that_is_no_picture_is_blamed_on_the_pictures(every: Any, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("no picture")
    open_at(browser, every, "model-1")
    browser.choose_files("form.image", tmp_path / "letter.png")
    fill(browser, prompt="a")
    browser.run("form.requestSubmit()")
    browser.wait_for("document.querySelector('#drop .bad')")
    assert text(browser, "#drop .bad").startswith("letter.png: no image that can be read")
    assert browser.run("document.querySelectorAll('figure').length") == 0


def test_a_film_begins_and_ends_with_a_picture_moves_and_is_downloaded(
    every: Any, browser: Browser, bundles: dict[str, Path], photos: list[Path], tmp_path: Path
) -> None:
    open_at(browser, every, "model-3")
    fill(browser, prompt="a ring", seed=7, num_frames=5, guidance_scale=3, guidance_scale_2=1)
    browser.run("form.requestSubmit()")
    assert text(browser, "#drop .bad") == "this model draws nothing without a picture; choose one"
    browser.run("chosen().details.takes.pictures.least = 2")  # as of Wan's FLF2V
    browser.run("form.requestSubmit()")
    assert text(browser, "#drop .bad") == "this model draws nothing without 2 pictures; 0 chosen"
    browser.run("chosen().details.takes.pictures.least = 1")
    assert text(browser, "#pictures-are").startswith("picture that the film begins with, and one that it ends with")
    browser.choose_files("form.image", photos[0], photos[1])
    browser.wait_for("pictures.length == 2")
    browser.run("form.requestSubmit()")
    browser.wait_for(f"{DONE} == 1")
    (tmp_path / "files").mkdir()
    file = browser.download("document.querySelector('.deeds a')", tmp_path / "files")
    assert file.name == "model-3-7-1.png"
    ours, (first, last) = (
        Pipeline(bundles["model-3"], threads=1),
        [resized(Image.open(each), 32, 32) for each in photos[:2]],
    )
    scales = {"guidance_scale": 3.0, "guidance_scale_2": 1.0}
    expected = ours("a ring", image=first, last_image=last, seed=7, num_frames=5, **scales).arrays[0]
    with Image.open(file) as film:
        for index, frame in enumerate(expected):
            film.seek(index)
            np.testing.assert_array_equal(np.asarray(film.convert("RGB")), frame)
    kind = "document.querySelector('figure img').src.slice(0, 5)"
    for label, then in (("pause", "data:"), ("play", "blob:")):
        assert browser.run("document.querySelector('.deeds').lastChild.textContent") == label
        browser.run("document.querySelector('.deeds').lastChild.click()")
        assert browser.run(kind) == then


def test_a_film_is_webp_where_that_is_chosen_and_still_for_who_wants_that(
    every: Any, browser: Browser, tmp_path: Path
) -> None:
    open_at(browser, every, "model-4", still=True)
    fill(browser, prompt="a ring", output_format="webp")
    browser.run("form.requestSubmit()")
    browser.wait_for(f"{DONE} == 1")
    browser.wait_for("document.querySelector('.deeds').lastChild.textContent == 'play'")
    assert browser.run("document.querySelector('figure img').src.slice(0, 5)") == "data:"
    with Image.open(browser.download("document.querySelector('.deeds a')", tmp_path)) as film:
        assert (film.format, film.n_frames) == ("WEBP", 9)  # type: ignore[attr-defined]


def test_the_seed_that_was_used_is_taken_over(shared: Any, browser: Browser) -> None:
    open_at(browser, shared, "model-0")
    browser.run("named('prompt').value = 'a'; form.requestSubmit()")
    browser.wait_for(f"{DONE} == 1")
    first = shown(browser)
    browser.run("document.querySelector('.deeds button').click()")
    assert f"seed {browser.run('form.seed.value')}, image 1" in text(browser, "figcaption span")
    browser.run("form.requestSubmit()")
    browser.wait_for(f"underWay === null && {DONE} == 1")
    np.testing.assert_array_equal(shown(browser), first)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("size", "30x32", "width should be a multiple of 4, not 30; near are 28, 32"),
        ("num_inference_steps", 151, "num_inference_steps is 151; at most 150 are taken"),
        ("output_compression", 3.5, ""),  # the browser itself says that this is no step
    ],
)
def test_what_is_refused_is_said_beside_its_field(
    field: str, value: Any, said: str, shared: Any, browser: Browser
) -> None:
    open_at(browser, shared, "model-0")
    fill(browser, prompt="a", **{field: value})
    browser.run("form.requestSubmit()")
    if not said:
        assert not browser.run("form.checkValidity()")
        browser.wait_for(f"document.activeElement.name == {field!r}")  # which is seen, though it was not before
        return
    browser.wait_for("document.querySelector('label .bad')")
    assert browser.run(f"named({field!r}).closest('label').querySelector('.bad').textContent") == said
    assert browser.run("document.activeElement.name") == field
    assert browser.run("document.querySelectorAll('.bad:not([hidden])').length") == 1, "it is said once"
    browser.run(f"named({field!r}).value = ''; form.requestSubmit()")
    browser.wait_for(f"{DONE} == 1")
    assert browser.run("document.querySelector('label .bad') === null")


@pytest.fixture
def slow(start: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """slow(limits=..., bounds=...): a server whose steps take a twentieth of a second."""

    def begin(**options: Any) -> Any:
        running = start(**options)
        step = running.batcher.pipeline.step
        monkeypatch.setattr(running.batcher.pipeline, "step", lambda company: (time.sleep(0.05), step(company)))
        return running

    return begin


def test_a_full_queue_says_when_to_come_again(slow: Callable[..., Any], browser: Browser) -> None:
    running = slow(limits=Limits(max_rows=2, max_waiting=1), bounds=Bounds(deadline_s=3.0))
    open_at(browser, running, "model-0")
    with ThreadPoolExecutor(2) as others:
        for held in (lambda: running.batcher.running, lambda: running.batcher.waiting):
            others.submit(running.draw, num_inference_steps=150)
            while not held():
                time.sleep(0.01)
        fill(browser, prompt="a")
        browser.run("form.requestSubmit()")
        browser.wait_for("document.querySelector('figcaption .bad')")
    assert text(browser, "figcaption .bad") == "the queue is full (1 waiting); try again in 1 s"


def test_a_deadline_and_a_server_that_is_gone_are_said_where_the_picture_would_be(
    slow: Callable[..., Any], browser: Browser
) -> None:
    running = slow(bounds=Bounds(deadline_s=0.5))
    open_at(browser, running, "model-0")
    fill(browser, prompt="a", num_inference_steps=150)
    browser.run("form.requestSubmit()")
    browser.wait_for("document.querySelector('figcaption .bad')")
    assert text(browser, "figcaption .bad") == "not finished within 0.5 s; ask for fewer steps or images"
    running.close()
    browser.run("form.requestSubmit()")
    browser.wait_for("(document.querySelector('figcaption .bad') ?? {}).textContent == 'the server cannot be reached'")


def test_an_answer_that_ends_too_early_and_one_of_a_proxy_are_said(shared: Any, browser: Browser) -> None:
    """`fetch` stands for what is in between, which is not there in tests."""
    open_at(browser, shared, "model-0")
    fill(browser, prompt="a")
    for answer, said in (
        ('new Response(\'data: {"type": "obsdiff.progress", "step": 1, "steps": 2}\\n\\n\')', "the server broke off"),
        ("new Response('', {status: 429, headers: {'retry-after': 7}})", "the server answered 429; try again in 7 s"),
        ("new Response('<html>', {status: 502})", "the server answered 502"),
    ):
        browser.run(f"window.fetch = async () => {answer}; form.requestSubmit()")
        browser.wait_for("underWay === null")
        assert text(browser, "figcaption .bad") == said


def test_a_key_is_asked_for_and_used(start: Any, browser: Browser) -> None:
    running = start(api_keys=("secret",))
    browser.open(running.url)
    browser.wait_for("document.querySelector('#locked .bad')")
    assert "wants an API key" in text(browser, "#locked .bad")
    assert browser.run("document.activeElement.id") == "key"
    browser.write("secret")
    browser.press("Tab")
    browser.wait_for("models.length == 1")
    assert browser.run("document.querySelector('#locked .bad') === null")
    fill(browser, prompt="a")
    browser.run("form.requestSubmit()")
    browser.wait_for(f"{DONE} == 1")


def test_the_keyboard_is_enough(every: Any, browser: Browser) -> None:
    """Every field that is seen is reached, and has a label; Enter on the button draws."""
    open_at(browser, every, "model-3")
    browser.run("named('prompt').focus()")
    browser.write("a ring")
    reached, wanted = [], browser.run("[...form.elements].filter(each => each.checkVisibility()).length")
    for _ in range(2 * wanted):
        reached.append(browser.run("document.activeElement.name || document.activeElement.id"))
        if reached[-1] == "draw":
            break
        browser.press("Tab")
    assert {"prompt", "negative_prompt", "image", "guidance_scale_2", "num_frames", "n", "draw"} <= set(reached)
    assert browser.run("[...form.elements].every(each => each.labels.length || each.tagName == 'BUTTON')")
    browser.press("Enter")
    browser.wait_for("document.querySelector('#drop .bad')")


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_can_be_read_by_day_and_by_night(
    dark: bool, every: Any, browser: Browser, photos: list[Path]
) -> None:
    open_at(browser, every, "model-1", width=360, height=740, dark=dark)
    browser.choose_files("form.image", *photos)
    fill(browser, prompt="a", num_inference_steps=1, size="31x31")
    browser.run("document.querySelector('details').open = true; form.requestSubmit()")
    browser.wait_for("document.querySelector('label .bad')")
    fill(browser, size="")
    browser.run("void draw(chosen(), 1, new AbortController().signal)")  # beside the error, which stays
    browser.wait_for(f"{DONE} == 1")
    wide = browser.run("document.documentElement.clientWidth")
    assert wide <= 360 or isinstance(browser, WebKit)  # whose window is no narrower than its buttons
    assert browser.run("document.documentElement.scrollWidth") <= wide
    for selector in ("label", "label .bad", "input", "figcaption span", "#draw", ".deeds a", "summary"):
        assert browser.run(CONTRAST.replace("SELECTOR", selector)) >= 4.5, selector


CONTRAST = """(() => {
    const light = colour => colour.match(/[0-9.]+/g).slice(0, 3).map(each => each / 255)
        .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
        .reduce((sum, each, index) => sum + each * [0.2126, 0.7152, 0.0722][index], 0);
    const element = document.querySelector('SELECTOR'), ink = light(getComputedStyle(element).color);
    let behind = element;
    while (getComputedStyle(behind).backgroundColor == 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    const ground = light(getComputedStyle(behind).backgroundColor);
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
})()"""
"""Of an element's text upon what is behind it, as the Web Content Accessibility Guidelines count it; they want 4.5."""


def test_it_loads_nothing_from_elsewhere_and_runs_nothing_else(shared: Any, browser: Browser) -> None:
    for path in page.FILES:
        answer = shared.client.get(path)
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert not re.search(r"https?:|[\"'(]//|@import", answer.text)
    open_at(browser, shared, "model-0")
    browser.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'ran = 1'}))")
    assert browser.run("typeof ran") == "undefined"
    assert re.search("Content.Security.Policy", browser.heard()[0])
    assert browser.run("performance.getEntriesByType('resource').every(each => each.name.startsWith(location.origin))")
