"""Look at a page in a real browser: take pictures of it, and fail where a reader would see something wrong.

    pip install 'hf_blockprune[browser]'
    python scripts/screenshot.py report.html --output pictures

Writes desktop-light.png and phone-dark.png. A page fails that writes to the console, scrolls sideways, is wider than
its window, or comes out as one colour.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when Qt starts: no screen is needed, and containers seldom allow a sandbox.
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
FLAGS = "--no-sandbox --disable-gpu --blink-settings=preferredColorScheme="

from PySide6.QtCore import QEventLoop, QSize, QTimer, QUrl  # noqa: E402
from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineSettings  # noqa: E402
from PySide6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PySide6.QtWidgets import QApplication  # noqa: E402

PATIENCE_MS = 60_000
MEASURE = """JSON.stringify((() => {
    const wide = [...document.querySelectorAll("body *")].filter(e => {
        if (e.closest(".wide") && !e.classList.contains("wide")) return false;  // scrolls inside
        return e.getBoundingClientRect().right > window.innerWidth + 1;
    });
    window.scrollTo(100, 0);
    const scrolled = window.scrollX;
    window.scrollTo(0, 0);
    return {
        inner: window.innerWidth,
        page: document.documentElement.scrollWidth,
        height: document.documentElement.scrollHeight,
        scrolled,
        wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
        dark: matchMedia("(prefers-color-scheme: dark)").matches,
        broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
        images: document.images.length,
    };
})())"""


@dataclass(frozen=True)
class Screen:
    """A window to look through: its width in CSS pixels, device pixels in one of these, and the preferred colours."""

    width: int
    scale: int
    dark: bool


SCREENS = {"desktop-light": Screen(1200, 1, False), "phone-dark": Screen(390, 2, True)}


class Page(QWebEnginePage):
    """Keeps what the page writes to the console: errors of scripts, and what its policy forbade."""

    def __init__(self, parent: Any) -> None:
        super().__init__(parent)
        self.messages: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        self.messages.append(f"line {line}: {message}")


def main() -> None:
    """Take the pictures, each in a process of its own; exit with 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--anchor", help="id of the element to begin the pictures at")
    parser.add_argument("--height", type=int, default=1500, help="CSS pixels of the page to show")
    parser.add_argument("--screen", choices=SCREENS, help="one of the pictures, instead of all")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.screen is None:
        again = [sys.executable, __file__, *sys.argv[1:], "--screen"]
        sys.exit(max(subprocess.run([*again, name], check=False).returncode for name in SCREENS))
    screen = SCREENS[options.screen]
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = f"{FLAGS}{0 if screen.dark else 1}"
    app = QApplication(sys.argv[:1])
    result = look(options, screen, options.output / f"{options.screen}.png")
    print(json.dumps({"screen": options.screen, **result}), flush=True)
    app.quit()
    os._exit(1 if result["wrong"] else 0)  # Qt complains of the order in which Python would clear up


def look(options: argparse.Namespace, screen: Screen, picture: Path) -> dict[str, Any]:
    """Open the page, measure it and photograph it from its top, or from an element, down."""
    view = QWebEngineView()
    view.setPage(Page(view))
    view.settings().setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)
    view.resize(QSize(screen.width, options.height) * screen.scale)
    view.setZoomFactor(screen.scale)
    view.show()
    loaded = wait(view.loadFinished.connect, lambda: view.load(QUrl.fromLocalFile(str(options.page.resolve()))))
    pause(500)
    found = json.loads(wait(lambda take: view.page().runJavaScript(MEASURE, take)))
    if options.anchor is not None:
        go = f"document.getElementById({json.dumps(options.anchor)}).scrollIntoView(); 0"
        wait(lambda take: view.page().runJavaScript(go, take))
    pause(500)
    image = view.grab().toImage()
    image.save(str(picture))
    colours = {image.pixel(x, y) for x in range(0, image.width(), 3) for y in range(0, image.height(), 7)}
    messages = view.page().messages
    checks = {
        "did not load": not loaded,
        "scrolls sideways": found["scrolled"] != 0 or found["page"] > found["inner"],
        "something is wider than the window": bool(found["wide"]),
        "is not in the preferred colours": found["dark"] != screen.dark,
        "wrote to the console": bool(messages),
        "came out as one colour": len(colours) < 5,
        "holds broken images": found["broken"] > 0,
    }
    wrong = [what for what, happened in checks.items() if happened]
    return {**found, "colours": len(colours), "console": messages, "wrong": wrong}


def wait(start: Callable[[Callable[..., None]], Any], begin: Callable[[], Any] | None = None) -> Any:
    """What a callback is given, which `start` is handed, once it is called."""
    loop, got = QEventLoop(), []

    def take(value: Any = None) -> None:
        got.append(value)
        loop.quit()

    start(take)
    if begin is not None:
        begin()
    QTimer.singleShot(PATIENCE_MS, loop.quit)
    if not got:
        loop.exec()
    if not got:
        raise SystemExit("the browser did not answer")
    return got[0]


def pause(milliseconds: int) -> None:
    """Let the browser draw."""
    loop = QEventLoop()
    QTimer.singleShot(milliseconds, loop.quit)
    loop.exec()


if __name__ == "__main__":
    main()
