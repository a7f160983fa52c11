"""The few HTML elements that a report is made of; every value is escaped here."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

from analysis.show.numbers import number


def text(value: object) -> str:
    """The value as it is shown, escaped."""
    return html.escape(number(value))


def card(name: str, value: str, unit: str = "", under: str = "", colour: str = "") -> str:
    """One headline figure."""
    small = f" <small>{text(unit)}</small>" if unit else ""
    return (
        f'<div class="card"><div class="name">{text(name)}</div>'
        f'<div class="value {text(colour)}">{text(value)}{small}</div><div class="soft">{text(under)}</div></div>'
    )


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in a box of its own that scrolls sideways when the page is narrow."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    title = f'<div class="title">{text(caption)}</div>' if caption else ""
    # focusable, so that the keyboard can scroll it
    return f'<div class="scroll" tabindex="0">{title}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(caption: str, values: Mapping[str, object]) -> str:
    """A two-column table of names and values, which wrap instead of scrolling."""
    title = f'<div class="title">{text(caption)}</div>' if caption else ""
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in values.items()
    )
    return f'<div class="scroll">{title}<table class="pairs"><tbody>{body}</tbody></table></div>'


def notes(lines: Iterable[str]) -> str:
    """A list of remarks."""
    return '<ul class="notes">' + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>"


def picture(light_png: bytes, dark_png: bytes, alt: str, caption: str) -> str:
    """A figure that follows the reader's colour scheme, both versions embedded."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light_png, dark_png))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" width="1200" height="920" alt="{text(alt)}"></picture>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def page(title: str, css: str, body: Iterable[str]) -> str:
    """The whole document: no script, no request to anywhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title>\n<style>\n{css}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
