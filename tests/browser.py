"""The mark of tests that look at a page in a real browser."""

from importlib.util import find_spec

import pytest


def needs_browser():
    """Skip where there is none."""
    absent = find_spec("PySide6") is None or find_spec("PySide6.QtWebEngineWidgets") is None
    return pytest.mark.skipif(absent, reason="needs a browser: pip install 'hf_blockprune[browser]'")
