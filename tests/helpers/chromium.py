"""Where a Chromium is, for the test and the pictures of the server's page."""

from __future__ import annotations

import shutil
from pathlib import Path


def find_chromium() -> str | None:
    """Debian's Chromium, a Chrome on the PATH, or the one that playwright installed."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return path
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
        return path if Path(path).exists() else None
