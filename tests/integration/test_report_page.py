"""The report's page in Chromium, controlled by its debugging pipe, which needs no other package."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from anomalib_dskd.benchmark.report.write_report import write_report
from tests.unit.benchmark.report.test_report import HOSTILE, NO_RESULT, small_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 60  # time limit for one answer of the browser, on a busy machine

# The browser reads commands from descriptor 3 and writes answers to 4: this opens them, and becomes the browser.
LAUNCHER = (
    "import os, sys; a, b = (os.dup(int(n)) for n in sys.argv[1:3]); "
    "os.dup2(a, 3); os.dup2(b, 4); [os.set_inheritable(n, True) for n in (3, 4)]; os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A page in headless Chromium, its console messages, and its network requests."""

    def __init__(self, executable: str, folder: Path) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")
        quiet = ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")
        arguments = [executable, *options, *quiet, f"--user-data-dir={folder}", "about:blank"]
        launch = [sys.executable, "-c", LAUNCHER, str(commands), str(answers), *arguments]
        self._process = subprocess.Popen(
            launch, pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        self._ids, self._buffer, self._session = itertools.count(1), b"", None
        self.events: list[dict] = []

    def attach(self) -> None:
        """Open an empty page, and receive its events."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters):
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _receive(self) -> dict:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            assert ready, f"no answer from the browser in {SECONDS} seconds"
            received = os.read(self._answers, 2**20)
            assert received, "the browser has ended"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path) -> None:
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, script: str):
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, height: int = 900, *, phone: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def set_color_scheme(self, scheme: str) -> None:
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, *, whole_page: bool = True) -> None:
        image = self.send("Page.captureScreenshot", captureBeyondViewport=whole_page)["data"]
        path.write_bytes(base64.b64decode(image))

    def close(self) -> None:
        try:
            self._session = None
            self.send("Browser.close")
            self._process.wait(SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._commands)
            os.close(self._answers)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a small run, open in a browser."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (chromium, chromium-browser or google-chrome on the PATH)")
    run = small_run(tmp_path_factory.mktemp("report") / "run")
    path = write_report(run)[-1]
    with tempfile.TemporaryDirectory(prefix="anomalib-dskd-", ignore_cleanup_errors=True) as profile:
        browser = Browser(CHROMIUM, Path(profile))
        try:
            browser.attach()
            browser.resize(1280)
            browser.open(path)
            yield browser
        finally:
            browser.close()


def rows(browser: Browser, title: str) -> list[list[str]]:
    """The current texts of a table's body."""
    return browser.evaluate(
        f"[...document.querySelector('[aria-label={json.dumps(title)}] table').tBodies[0].rows]"
        ".map((row) => [...row.cells].map((cell) => cell.innerText.trim()))"
    )


def click(browser: Browser, title: str, heading: str) -> str:
    """Click a heading, and return its sort order."""
    return browser.evaluate(
        f"(() => {{ const heading = [...document.querySelectorAll('[aria-label={json.dumps(title)}] th')]"
        f".find((th) => th.innerText.trim() === {json.dumps(heading)}); heading.querySelector('button').click();"
        " return heading.getAttribute('aria-sort'); })()"
    )


def test_the_page_has_all_tables(page):
    titles = page.evaluate("[...document.querySelectorAll('main h3, main summary')].map((title) => title.innerText)")
    for title in ("Accuracy, %", "Image AUROC by category, %", "AUPRO by kind of defect, %", "Cost", "Failed jobs"):
        assert title in titles
    assert [row[0] for row in rows(page, "Accuracy, %")] == ["DSKD", "PaDiM", HOSTILE, "STFPM"]
    assert rows(page, "Accuracy, %")[0][1] == "92.0 ± 2.8"
    assert rows(page, "Failed jobs")[0][-1] == "RuntimeError: <script>alert(1)</script>"


def test_all_images_are_loaded(page):
    images = page.evaluate("[...document.images].map((image) => [image.naturalWidth, image.alt])")
    assert len(images) > 10
    assert all(width > 0 and alt for width, alt in images)
    plot = "document.querySelector('figure svg')"
    assert page.evaluate(f"{plot}.getBoundingClientRect().height") > 100
    assert "DSKD 92.0 % at 20.0, 10.0 ms" in page.evaluate(f"{plot}.getAttribute('aria-label')")
    assert "the file is gone" in page.evaluate("document.querySelector('.gallery').innerText")


def test_sorting_is_by_value_with_missing_values_last(page):
    def latencies():
        return [row[1].split(" ")[0] for row in rows(page, "Cost")]

    before = latencies()
    assert before == ["20.0", "12.0", "200.0", "failed", NO_RESULT, NO_RESULT]  # as texts, 200.0 would be before 20.0
    assert click(page, "Cost", "PyTorch, ms") == "ascending"
    assert latencies() == ["12.0", "20.0", "200.0", "failed", NO_RESULT, NO_RESULT]
    assert click(page, "Cost", "PyTorch, ms") == "descending"
    assert latencies() == ["200.0", "20.0", "12.0", "failed", NO_RESULT, NO_RESULT]
    assert click(page, "Cost", "PyTorch, ms") == "none"
    assert latencies() == before


def test_sorting_is_by_the_value_before_rounding(page):
    assert click(page, "Cost", "fit, s") == "ascending"
    shown = {row[0]: row[10].split(" ")[0] for row in rows(page, "Cost")[:3]}
    assert list(shown.items()) == [(HOSTILE, "100.0"), ("DSKD", "100.0"), ("PaDiM", "100.0")]


def test_only_one_heading_has_a_sort_order(page):
    assert click(page, "Accuracy, %", "image AUROC") == "descending"  # the best first
    assert [row[0] for row in rows(page, "Accuracy, %")] == ["PaDiM", "DSKD", HOSTILE, "STFPM"]
    assert click(page, "Accuracy, %", "model") == "ascending"
    assert [row[0] for row in rows(page, "Accuracy, %")] == [HOSTILE, "DSKD", "PaDiM", "STFPM"]
    sorting = "[...document.querySelectorAll('[aria-label=\"Accuracy, %\"] th')].map((th) => th.ariaSort)"
    assert [order for order in page.evaluate(sorting) if order not in (None, "none")] == ["ascending"]


def test_the_mean_stays_below_the_sorted_rows(page):
    title = "Image AUROC by category, %"
    assert click(page, title, "DSKD") == "descending"
    assert click(page, title, "DSKD") == "ascending"
    assert [row[0] for row in rows(page, title)] == ["cable", "bottle"]
    last = f"document.querySelector('[aria-label={json.dumps(title)}] tfoot').innerText"
    assert page.evaluate(last).split("\t")[0].strip() == "mean"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_does_not_scroll_sideways(page, width, scheme):
    page.resize(width, phone=width < 500)
    page.set_color_scheme(scheme)
    page.evaluate("document.querySelectorAll('details').forEach((folded) => { folded.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.documentElement.clientWidth") == width


def test_both_color_schemes_have_a_high_contrast(page):
    luminances = []
    for scheme in ("light", "dark"):
        page.set_color_scheme(scheme)
        style = "getComputedStyle(document.body)"
        colors = page.evaluate(f"[{style}.backgroundColor, {style}.color]")
        luminances.append([luminance(color) for color in colors])
    (paper, ink), (dark_paper, dark_ink) = luminances
    assert (paper + 0.05) / (ink + 0.05) > 7  # WCAG 2, level AAA
    assert (dark_ink + 0.05) / (dark_paper + 0.05) > 7


def luminance(color: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2 defines it."""
    values = np.array([int(value) for value in color[4:-1].split(",")]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_folded_tables_unfold_for_printing(page):
    page.evaluate("document.querySelectorAll('details').forEach((folded) => { folded.open = false; })")
    folded = "[...document.querySelectorAll('details')].map((details) => details.open)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert all(page.evaluate(folded))
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not any(page.evaluate(folded))


def test_nothing_is_fetched_and_the_console_is_silent(page):
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 200))")  # the last test: all events of the page
    requested = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert requested
    assert {address.partition(":")[0] for address in requested} == {"file", "data"}
    kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [event for event in page.events if event["method"] in kinds] == []
