"""A headless Chromium that opens pages and says what goes wrong in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Error, Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
DRAWN = "body[data-drawn=all]"
MILLISECONDS = 120_000
"""That a busy machine may take for a page."""


@dataclass
class OpenPage:
    """A page that is open, with all its charts drawn."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console, and exceptions."""
    requests: list[str] = field(default_factory=list)
    """Addresses that were asked for."""

    def run(self, script: str) -> Any:
        return self.page.evaluate(script)

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Yield Debian's Chromium. Tests of pages need it: without it they fail."""
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
            )
        except Error as error:
            raise AssertionError(f"needs Chromium as {CHROMIUM} (apt: chromium): {error}") from None
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Browser, path: Path, *, width: int = 1280, scheme: Any = "light", **context: Any
) -> Iterator[OpenPage]:
    """Yield the page of a file after all its charts have been drawn."""
    with browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, **context
    ) as around:
        page = around.new_page()
        page.set_default_timeout(MILLISECONDS)
        seen = OpenPage(page)
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("console", lambda said: _note(seen, said.type, said.text))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(path.resolve().as_uri())
        page.wait_for_selector(DRAWN, state="attached")
        yield seen


def _note(seen: OpenPage, kind: str, text: str) -> None:
    if kind in ("error", "warning"):
        seen.complaints.append(text)
