"""The report's page in headless Chromium: `make test-browser` installs what it takes."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
try:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
except ImportError:
    MISSING.append("selenium")
if MISSING and "GANKIT_BROWSER" not in os.environ:  # with it, missing is failing
    pytest.skip(f"{', '.join(MISSING)} missing: make test-browser installs them", allow_module_level=True)

from recorded import record  # noqa: E402

from gankit import report  # noqa: E402
from gankit.rundir import RunDir  # noqa: E402

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NASTY = "<img src=x onerror=console.error(1)>"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two runs of the plane, the second at other steps and under a name that wants to be markup, and one of images."""
    folder = tmp_path_factory.mktemp("page")
    runs = [
        record(folder / "one"),
        record(folder / NASTY, plugin="r1", steps=(12, 24, 29)),
        record(folder / "three", points=False),
    ]
    path = folder / "report.html"
    report.write([RunDir(run) for run in runs], path)
    assert path.stat().st_size < 5_000_000
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page as it opens, 1280 pixels wide in light; after the test, its console is empty and it has asked for nothing."""
    emulate(browser, 1280, "light")
    browser.get(url)
    yield browser
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [one["params"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    by_page = {one["request"]["url"] for one in sent if one["documentURL"] == url}  # not by Chromium's first, empty one
    assert url in by_page
    assert {one for one in by_page - {url} if not one.startswith("data:")} == set()


def emulate(browser: Any, width: int, scheme: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


def seen(page: Any) -> list[tuple[int, str]]:
    """Of each run the step whose picture is on the screen, and the topmost layer's data."""
    script = """return [...document.querySelectorAll(".run")].map(run => {
      const frames = [...run.querySelectorAll(".frame")].filter(frame => frame.lastElementChild.getClientRects().length);
      if (frames.length !== 1) throw Error(frames.length + " frames are shown at once");
      const image = frames[0].lastElementChild;
      if (!image.complete || !image.naturalWidth) throw Error("the picture is broken");
      return [+frames[0].dataset.step, image.src];
    })"""
    return [(step, source) for step, source in page.execute_script(script)]


def steps(page: Any) -> list[int]:
    return [step for step, _ in seen(page)]


def press(page: Any, *keys: str) -> None:
    page.switch_to.active_element.send_keys(*keys)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_slider_and_keys_move_all_runs_together(page: Any) -> None:
    start = seen(page)
    assert [step for step, _ in start] == [30, 29, 30]  # the last recorded
    press(page, Keys.ARROW_LEFT)  # the slider has the focus; the steps are 10 12 20 24 29 30
    assert steps(page) == [30, 29, 30]
    press(page, Keys.ARROW_LEFT)
    assert steps(page) == [20, 24, 20]  # each run's nearest one
    moved = seen(page)
    assert all(before[1] != after[1] for before, after in zip(start, moved, strict=True))
    press(page, Keys.HOME)
    assert steps(page) == [10, 12, 10]
    assert page.find_element(By.ID, "slider").get_attribute("aria-valuetext") == "step 10"
    assert page.find_element(By.ID, "step").text == "step 10"
    said = [part.text for part in page.find_elements(By.CLASS_NAME, "said") if part.is_displayed()]
    assert [text.split(":")[0] for text in said] == ["step 10", "step 12", "step 10"]
    assert "modes captured 1" in said[0]
    press(page, Keys.END)
    assert seen(page) == start
    page.execute_script("document.activeElement.blur()")
    press(page, Keys.ARROW_LEFT, Keys.ARROW_LEFT)  # the page itself listens, too
    assert steps(page) == [20, 24, 20]
    press(page, Keys.HOME, Keys.SPACE)  # but to nothing that scrolls it
    assert steps(page) == [20, 24, 20]
    assert page.find_element(By.ID, "play").text == "play"
    page.execute_script("const s = document.getElementById('slider'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert steps(page) == [10, 12, 10]


def test_the_mark_in_the_curves_is_at_the_step(page: Any) -> None:
    script = """const over = document.querySelector(".over"), mark = over.querySelector(".cursor").getBoundingClientRect();
      const box = over.getBoundingClientRect();
      return (mark.left + mark.width / 2 - box.left) / box.width"""
    last = page.execute_script(script)
    press(page, Keys.HOME)
    first = page.execute_script(script)
    # steps 5 to 30, 2 % of room on each side, between 13 % and 97 % of the width
    assert last == pytest.approx(0.13 + 0.84 * (25.5 / 26), abs=0.01)
    assert first == pytest.approx(0.13 + 0.84 * (5.5 / 26), abs=0.01)


def test_space_plays_to_the_end_and_stops(page: Any) -> None:
    press(page, Keys.SPACE)
    play = page.find_element(By.ID, "play")
    assert (steps(page), play.text) == ([10, 12, 10], "stop")
    press(page, Keys.SPACE)
    assert play.text == "play"
    play.click()
    until(lambda: play.text == "play")
    assert steps(page) == [30, 29, 30]


def test_layers_come_and_go(page: Any) -> None:
    def visible(kind: str) -> bool:
        frame = "document.querySelector('.run').querySelector('.frame:not([hidden])')"
        where = frame if kind != "real" else "document"
        return page.execute_script(f"return getComputedStyle({where}.querySelector('.{kind}')).visibility") == "visible"

    for key, kinds in (("f", ("colors", "contours")), ("g", ("arrows",)), ("r", ("real",))):
        assert all(map(visible, kinds))
        press(page, key)
        assert not any(map(visible, kinds))
        press(page, key)
        assert all(map(visible, kinds))
    page.find_element(By.CSS_SELECTOR, "[data-layer=field]").click()
    assert not visible("colors")
    assert visible("fake")
    box, axes = page.execute_script("""const plane = document.querySelector(".plane");
      const rect = element => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; };
      return [rect(plane), rect(plane.querySelector(".frame:not([hidden]) .colors"))]""")
    assert axes == pytest.approx([box[0] + 0.1 * box[2], box[1] + 0.05 * box[3], 0.88 * box[2], 0.88 * box[3]], abs=1.5)


def test_light_and_dark(page: Any) -> None:
    def brightness() -> int:
        color = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in color[4:-1].split(",")[:3])

    theme = page.find_element(By.ID, "theme")
    assert brightness() > 700
    theme.click()
    theme.click()
    assert brightness() < 100
    theme.click()
    emulate(page, 1280, "dark")
    until(lambda: brightness() < 100)
    line = page.execute_script("return getComputedStyle(document.querySelector('.over svg text')).fill")
    assert min(int(part) for part in line[4:-1].split(",")) > 150  # ticks are light on dark
    theme.click()
    assert brightness() > 700


@pytest.mark.parametrize("width", [390, 768])
def test_narrow_screens_show_all_without_scrolling_sideways(page: Any, width: int) -> None:
    emulate(page, width, "light")
    until(lambda: page.execute_script("return innerWidth") == width)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    wide = page.execute_script("""const out = element => element.getBoundingClientRect().right > innerWidth + 1;
      const all = [...document.querySelectorAll("body *")].filter(element => !element.closest(".scroll"));
      return all.filter(out).map(element => element.outerHTML.slice(0, 80))""")
    assert wide == []
    button = page.find_element(By.ID, "play").size
    assert min(button["width"], button["height"]) >= 36  # a finger's
    assert page.find_element(By.CSS_SELECTOR, ".stage").size["width"] > 0.75 * min(width, 400)


def test_a_name_stays_text(page: Any) -> None:
    assert NASTY in page.find_element(By.TAG_NAME, "h1").text
    assert page.find_elements(By.CSS_SELECTOR, "img[onerror]") == []


def test_everything_can_be_reached_by_tab(page: Any) -> None:
    reached = set()
    for _ in range(60):
        press(page, Keys.TAB)
        element = page.switch_to.active_element
        reached.add(element.get_attribute("id") or element.get_attribute("data-layer") or element.tag_name)
    assert {"play", "slider", "theme", "field", "arrows", "real", "summary"} <= reached
