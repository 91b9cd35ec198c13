"""Reads a report as it was written."""

import json
import re
from html.parser import HTMLParser
from typing import Any


def page_data(text: str) -> dict[str, Any]:
    """Return the data of the charts."""
    (found,) = re.findall(r'id="report-data">(.*?)</script>', text, re.S)
    data: dict[str, Any] = json.loads(found)
    return data


def page_text(text: str) -> str:
    """Return what a reader sees without JavaScript, with single spaces."""
    body = re.sub(r"<script.*?</script>", "", text.split("<body>")[1], flags=re.S)
    reader = _Reader()
    reader.feed(body)
    return " ".join("".join(reader.texts).split())


def table_rows(text: str, name: str) -> list[list[str]]:
    """Return the texts of the cells of a table, without its head."""
    (table,) = re.findall(rf'<table[^>]* id="{name}">.*?<tbody>(.*?)</tbody>', text, re.S)
    reader = _Reader()
    reader.feed(table)
    return [[cell.strip() for cell in row] for row in reader.rows]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag == "td" and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data
