"""The page of `lfm report` as a browser shows it."""

import io
import shutil

import numpy as np
import pytest

from launcher.cli import main as lfm

pytestmark = pytest.mark.extra

STEPS = 6
WIDTH = 1280
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
)  # fmt: skip
# For every drawing: its texts, its position on the page, and each curve's box and colour.
MEASURE = """
return [...document.querySelectorAll("figure > svg")].map(svg => {
    const box = element => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
    const texts = [...svg.querySelectorAll("text")];
    return {
        texts: texts.map(text => text.textContent), text_boxes: texts.map(box), box: box(svg),
        curves: [...svg.querySelectorAll("g[id^=line2d] > path")]
            .filter(path => getComputedStyle(path).stroke != "none" && path.hasAttribute("clip-path"))
            .map(path => ({box: box(path), colour: getComputedStyle(path).stroke.match(/\\d+/g).map(Number),
                           is_grid: getComputedStyle(path).strokeOpacity < 1})),
    };
});
"""


@pytest.fixture(scope="module")
def page(trainer, tmp_path_factory):
    """The report of a small run with validation in a browser: its size, its drawings, and a screenshot of all of it."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no Chromium to open the page; apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    folder = tmp_path_factory.mktemp("report")
    trainer.run(1, trainer.arguments(
        "reported", f"data={folder / 'data'}", "prepare.seq_len=64", "prepare.validation_share=0.02", "monitor.every=2",
        f"max_steps={STEPS}", "monitor.peak_teraflops=0.5", "validate_every=2", "validation_samples=2",
    ))  # fmt: skip
    lfm(["report", str(trainer.folder / "reported"), "--out", str(folder / "report.html")])
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        browser.set_page_load_timeout(60)
        browser.set_window_size(WIDTH, 1000)
        browser.get((folder / "report.html").as_uri())
        # Make the window as high as the page, so that the screenshot has all of it.
        outer, inner = browser.execute_script("return [window.outerHeight, window.innerHeight]")
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.set_window_size(WIDTH, height + outer - inner)
        picture = browser.get_screenshot_as_png()
        (folder / "report.png").write_bytes(picture)
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
        sizes = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        images = browser.execute_script(
            "return [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.clientHeight])"
        )
        yield {"drawings": browser.execute_script(MEASURE), "pixels": pixels, "widths": sizes, "images": images}
    finally:
        browser.quit()


def test_every_plot_is_drawn(page):
    """Each curve has an extent, and pixels of its colour inside its box on the screen."""
    titles = {text for drawing in page["drawings"] for text in drawing["texts"]}
    assert {"Loss", "Learning rate", "Gradient norm", "Seconds per step", "Router entropy"} <= titles
    assert len(page["drawings"]) >= 12
    for drawing in page["drawings"]:
        name = drawing["texts"]
        curves = [curve for curve in drawing["curves"] if not curve["is_grid"]]
        assert curves, name
        left, top, right, bottom = drawing["box"]
        assert right - left > 400 and bottom - top > 200, name
        hidden = 0
        for curve in curves:
            x0, y0, x1, y1 = curve["box"]
            assert x1 - x0 > 100 and left <= x0 and x1 <= right and top <= y0 <= y1 <= bottom, name
            seen = page["pixels"][int(y0) - 2 : int(y1) + 3, int(x0) : int(x1) + 1]
            near = np.abs(seen - curve["colour"][:3]).max(axis=2) < 40
            hidden += not near.any(axis=0).mean() > 0.3  # of the columns; a later curve may cover an earlier one
        assert hidden <= len(curves) // 2, name


def test_no_text_of_a_plot_is_cut_off_and_the_page_fits_the_window(page):
    width, window = page["widths"]
    assert width <= window
    for drawing in page["drawings"]:
        left, top, right, bottom = drawing["box"]
        for text, (x0, y0, x1, y1) in zip(drawing["texts"], drawing["text_boxes"], strict=True):
            assert left - 1 <= x0 and x1 <= right + 1 and top - 1 <= y0 and y1 <= bottom + 1, text


def test_the_experts_load_is_large_enough_to_read(page):
    ((natural, shown, height),) = page["images"]
    assert natural > 0 and shown >= 240 and height >= 24
