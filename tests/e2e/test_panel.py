"""The panel in ComfyUI's own page: real servers, real ranks, a real browser.

``PANEL_PICTURES=FOLDER`` also keeps what it looked like: docs/panel.md shows that.
"""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rig import graphs
from rig.front_end import browser, browser_path, front_end
from rig.server import Server
from rig.trees import Tree

import comfy_xdit_patch
from comfy_xdit_patch.planning.strategy import BALANCING, NAMES

pytestmark = pytest.mark.skipif(browser_path() is None, reason="no Chromium is installed")

Servers = Callable[..., Server]
WEB = Path(comfy_xdit_patch.__file__).parent / "web"
DEADLINE_MS = 60_000
DEADLINE_S = 300.0
THEMES = ("dark", "light")


def graph_of(seed: int, *, steps: int, size: int = 256) -> graphs.Graph:
    graph = graphs.load("ksampler_dev")
    return graphs.with_values(graph, seed=seed, size=(size, size), steps=steps)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as running:
        yield running


class Panel:
    """The page of a server, with the tab open."""

    def __init__(self, server: Server, chromium: Any) -> None:
        self.server = server
        self.errors: list[str] = []
        self.looks: list[int] = []
        """Bytes of each status that the page was given."""
        answered = {"Comfy.TutorialCompleted": True}  # Else it begins with a tour.
        body = json.dumps(answered).encode()
        urllib.request.urlopen(f"{server.url}/settings", body, timeout=30).close()
        self.page = chromium.new_page(viewport={"width": 860, "height": 1000})
        self.page.set_default_timeout(DEADLINE_MS)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfinished", self._heard)
        self.page.goto(server.url)
        self.tab = self.page.get_by_role("button", name="GPUs that make one image together")
        self.tab.click()

    def _heard(self, request: Any) -> None:
        if request.url.endswith("/xdit/status"):
            self.looks.append(request.sizes()["responseBodySize"])

    def section(self, title: str) -> Any:
        return self.page.get_by_role("region", name=title, exact=True)

    def shows(self, title: str, text: str) -> None:
        """Wait until a section has a text."""
        self.section(title).filter(has_text=text).wait_for()

    def toast(self, text: str) -> None:
        """Wait until ComfyUI's page says a text in a toast."""
        self.page.locator(".p-toast-message").filter(has_text=text).first.wait_for()

    def change(self, **values: str) -> None:
        """Fill the form, by label, and apply it."""
        for label, value in values.items():
            if label == "GPUs":
                self.page.get_by_role("textbox", name=label, exact=True).fill(value)
            else:
                self.page.get_by_role("combobox", name=label, exact=True).select_option(value)
        self.page.get_by_role("button", name="Apply").press("Enter")

    def picture(self, name: str) -> None:
        """Keep what the panel looks like in the dark and the light theme, if that is asked for."""
        folder = os.environ.get("PANEL_PICTURES")
        self.section("State").evaluate("section => section.scrollIntoView({block: 'start'})")
        for theme in THEMES if folder else ():
            self.page.evaluate(
                "theme => window.comfyAPI.app.app.extensionManager.setting"
                ".set('Comfy.ColorPalette', theme)",
                theme,
            )
            image = Image.open(BytesIO(self.page.screenshot())).quantize(256)
            image.save(Path(str(folder)) / f"{name}-{theme}.png", optimize=True)


@pytest.fixture
def panel(servers: Servers, tree: Tree, chromium: Any) -> Iterator[Panel]:
    """The panel of a server with two ranks that have not started."""
    own_page = ("--front-end-root", str(front_end(tree)))
    opened = Panel(servers(tree, XDIT_GPUS="cpu:2", extra_args=own_page), chromium)
    yield opened
    opened.page.close()


def test_the_panel_follows_images_a_loss_a_refusal_and_changes(panel: Panel) -> None:
    server = panel.server
    panel.shows("State", "idle")
    panel.picture("idle")

    prompt = server.post_prompt(graph_of(800, steps=30))
    panel.shows("State", "starting")
    panel.shows("Under way", "the ranks start")
    panel.picture("starting")
    panel.toast("2 ranks are ready")
    panel.shows("State", "computing")
    panel.shows("Under way", "of 30")
    panel.page.get_by_role("img", name="2 ranks: ulysses 2").wait_for()
    assert panel.page.get_by_role("meter", name="memory").count() == 2
    panel.picture("two-ranks")

    os.kill(server.status()["ranks"][1]["pid"], signal.SIGKILL)
    panel.toast("steps run on one GPU: a worker was lost")
    panel.shows("Fell back to one GPU", "a worker was lost")
    panel.shows("Last error", "signal 9")
    server.wait(prompt, DEADLINE_S)
    panel.shows("State", "ready")
    panel.picture("a-lost-rank")

    server.run(graph_of(801, steps=2, size=16), DEADLINE_S)  # one image token for two ranks
    (refusal,) = [f for f in server.status()["fell_back"] if "lost" not in f["reason"]]
    for text in (refusal["reason"], refusal["remedy"].replace("`", "")):
        panel.shows("Fell back to one GPU", text)
    panel.picture("a-refusal")

    panel.change(GPUs="<b>4</b>")
    panel.shows("Settings", 'XDIT_GPUS="<b>4</b>" is not legal')
    panel.change(GPUs="cpu:4", Strategy="usp")
    panel.shows("Settings", "From the next prompt on.")
    prompt = server.post_prompt(graph_of(802, steps=30))
    panel.page.get_by_role("img", name="4 ranks: ring 2 x ulysses 2").wait_for()
    panel.shows("Under way", "of 30")
    panel.picture("four-ranks")
    panel.page.get_by_role("switch", name="Parallel").press("Space")
    panel.shows("Settings", "From the end of this prompt on.")
    server.wait(prompt, DEADLINE_S)
    panel.shows("State", "off")
    panel.page.get_by_role("button", name="As at the start").click()
    panel.section("GPUs").locator("li").nth(1).wait_for()
    assert panel.section("GPUs").locator("li").count() == 2
    assert panel.errors == []


@pytest.mark.newest_only
@pytest.mark.thorough  # It waits in real time; the bounds are those of docs/panel.md.
def test_a_page_asks_once_a_second_while_the_tab_is_open_and_seen(
    panel: Panel, record_property: Callable[[str, object], None]
) -> None:
    page = panel.page

    def looks() -> int:
        page.wait_for_timeout(1200)  # What was on its way comes.
        panel.looks.clear()
        page.wait_for_timeout(2200)
        return len(panel.looks)

    panel.shows("GPUs", "rank 1")
    assert 1 <= looks() <= 3
    record_property("bytes of a status", max(panel.looks))
    assert max(panel.looks) < 8192
    hidden = "Object.defineProperty(document, 'hidden', {value: true, configurable: true})"
    page.evaluate(hidden)
    assert looks() == 0
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_event("requestfinished", lambda request: "/xdit/status" in request.url)
    panel.tab.click()
    assert looks() == 0


def test_files_of_the_page_write_no_html_and_name_no_other_host() -> None:
    files = {path.name: path.read_text() for path in WEB.iterdir()}
    assert {"panel.js", "panel.css"} <= files.keys()
    for name, text in files.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        hosts = re.findall(r"(?:https?:)?//[a-z][\w.]*\.[a-z]+", text)
        assert set(hosts) <= {"http://www.w3.org"}, name
        assert max(map(len, text.splitlines())) <= 100, name
        assert text.isascii(), name


def test_the_form_offers_what_the_settings_know() -> None:
    text = (WEB / "controls.js").read_text()
    offered = {
        name: set(json.loads(re.search(rf"{name} = (\[.*\]);", text)[1]))  # type: ignore[index]
        for name in ("STRATEGIES", "BALANCES")
    }
    assert offered == {"STRATEGIES": set(NAMES) - {"off"}, "BALANCES": set(BALANCING)}
