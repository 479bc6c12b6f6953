"""A reader of `examples/app.py` in a real browser: names a picture in the page's file dialog, and tells what it shows.

    python scripts/app_in_browser.py http://127.0.0.1:7860 picture.png --screenshot page.png

Prints JSON: the title and text of the page, the rows of its tables, the errors that popped up, and how many file
dialogs it opened.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import screenshot  # first, as it says how Qt is to start
from PySide6.QtCore import QPoint, QSize, Qt, QUrl
from PySide6.QtTest import QTest
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

WAITS, PAUSE_MS = 600, 500
BUTTON = """JSON.stringify((() => {
    const input = document.querySelector("input[type=file]");
    const button = input && input.closest("button");
    if (!button) return null;
    const box = button.getBoundingClientRect();
    return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)];
})())"""
SHOWN = """JSON.stringify({
    title: document.title,
    text: document.body.innerText,
    rows: [...document.querySelectorAll("table tr")].map(row => [...row.cells].map(cell => cell.innerText.trim())),
    errors: [...document.querySelectorAll(".toast-body")].map(toast => toast.innerText),
})"""


class Page(screenshot.Page):
    """Answers the file dialog with a picture."""

    def __init__(self, parent: QWebEngineView, picture: Path) -> None:
        super().__init__(parent)
        self.picture, self.dialogs = picture, 0

    def chooseFiles(self, mode: object, old: object, kinds: object) -> list[str]:
        self.dialogs += 1
        return [str(self.picture)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--screenshot", type=Path)
    options = parser.parse_args()
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = f"{screenshot.FLAGS}1"
    app = QApplication(sys.argv[:1])
    view = QWebEngineView()
    page = Page(view, options.picture.resolve())
    view.setPage(page)
    view.resize(QSize(1200, 1300))
    view.show()
    screenshot.wait(view.loadFinished.connect, lambda: view.load(QUrl(options.address)))
    click(view, until(page, BUTTON, lambda place: place is not None))
    found = until(page, SHOWN, lambda shown: shown["rows"] or shown["errors"])
    if options.screenshot is not None:
        screenshot.pause(PAUSE_MS)
        view.grab().save(str(options.screenshot))
    print(json.dumps({**found, "dialogs": page.dialogs}), flush=True)
    app.quit()
    os._exit(0)  # as in screenshot.py


def click(view: QWebEngineView, place: list[int]) -> None:
    """With a real mouse: a page's own click opens no file dialog."""
    QTest.mouseClick(view.focusProxy(), Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier, QPoint(*place))


def until(page: Page, script: str, enough: object) -> object:
    """What a script gives once it is enough."""
    for _ in range(WAITS):
        found = json.loads(screenshot.wait(lambda take: page.runJavaScript(script, take)))
        if enough(found):
            return found
        screenshot.pause(PAUSE_MS)
    raise SystemExit(f"the page did not get there: {found}, {page.messages}")


if __name__ == "__main__":
    main()
