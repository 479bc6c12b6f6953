"""A strict reader of the pages that this package writes."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import torch
from PIL import Image

VOID = {"meta", "img", "br", "link", "input", "hr"}
CLOSED_BY_SLASH = {"line", "rect", "circle", "path"}
ACTIVE = {"script", "iframe", "object", "embed", "form", "base", "foreignobject", "use"}


class Page(HTMLParser):
    """Reads a page, and fails on what a browser would have to mend.

    Attributes:
        elements: (tag, attributes) of every element in order.
        text: of all elements but style, by tag of the element that holds it.
        tables: rows of cells' texts, by caption.
        masks: bool [rows, cols] of each picture, by the module that its alternative text names.
        headings: levels in order.
    """

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        assert html.startswith("<!DOCTYPE html>")
        self.html, self.open, self.elements, self.text, self.headings = html, [], [], [], []
        self.tables, self._rows, self._caption = {}, [], ""
        self.feed(html.removeprefix("<!DOCTYPE html>"))
        self.close()
        assert self.open == []
        self._check()
        self.masks = dict(map(self._picture, self.with_tag("img")))

    def with_tag(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes), attributes
        assert "<" not in tag
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        assert tag in CLOSED_BY_SLASH, tag
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()
        if tag == "table":
            assert self._caption
            self.tables.setdefault(self._caption, self._rows)

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if "caption" in self.open:
            self._caption += data
        elif "td" in self.open or "th" in self.open:
            self._rows[-1][-1] += data

    def _check(self):
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(set(ids)) == len(ids)
        assert not {tag for tag, _ in self.elements} & ACTIVE
        for tag, attributes in self.elements:
            assert not any(name.startswith("on") or name in ("style", "srcdoc") for name in attributes)
            assert attributes.get("href", "#").removeprefix("#") in (*ids, "")
            assert attributes.get("src", "data:image/png;").startswith("data:image/png;base64,") or tag != "img"
            if tag == "th":
                assert attributes["scope"] in ("row", "col")
            if tag == "img":
                assert attributes["alt"]
        assert "url(" not in self.html
        assert "@import" not in self.html
        assert all(a.get("aria-label") for a in self.with_tag("svg") if a.get("role") == "img")
        assert self.headings.count(1) == 1
        assert all(b <= a + 1 for a, b in zip(self.headings, self.headings[1:], strict=False))
        assert any(a.get("name") == "viewport" for a in self.with_tag("meta"))

    @staticmethod
    def _picture(attributes):
        image = Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2])))
        alpha = np.array(image.convert("RGBA"))[..., 3]
        assert set(np.unique(alpha)) <= {0, 255}
        return attributes["alt"].partition(": ")[0], torch.from_numpy(alpha > 0)
