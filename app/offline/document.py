"""A report as a list of parts, rendered to one HTML file or to Markdown with PNG files."""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from app.offline.tables import markdown_table

FIGURE_FOLDER: Final = "figures"

_STYLE: Final = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff;
       max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .8rem; border-top: 1px solid #d9dee6; }
p, ul { max-width: 46rem; }
figure { margin: 1rem 0; }
figure div { overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; }
figure img.wide { min-width: 34rem; }
figcaption { color: #566173; font-size: .9rem; max-width: 46rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .83rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: left; white-space: nowrap;
         border-bottom: 1px solid #e4e8ee; }
th { color: #566173; font-weight: 600; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; }
tr.marked td { background: #e8f1fb; font-weight: 600; }
.facts td + td { white-space: normal; }
.warning { border-left: 4px solid #c77700; background: #fff6e6; padding: .5rem .8rem; }
"""


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text; a warning stands out."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of text; those in ``marked`` stand out. Facts are pairs whose values may wrap."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    is_facts: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture with what it shows in words; ``name`` becomes the file's.

    One with text in it keeps a readable size in a narrow window, and is scrolled there.
    """

    name: str
    png: bytes
    caption: str
    has_text: bool = True


Part = Heading | Paragraph | Bullets | Table | Figure


@dataclass
class Document:
    """A title and its parts."""

    title: str
    parts: list[Part] = field(default_factory=list)

    def add(self, *parts: Part) -> None:
        """Put parts at the end."""
        self.parts.extend(parts)

    def as_html(self) -> str:
        """One file that loads nothing: the figures are part of it."""
        title = html.escape(self.title)
        body = "\n".join(_html(part) for part in self.parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )

    def as_markdown(self) -> str:
        """The same, with the figures as files below ``figures/``."""
        lines = [f"# {self.title}", ""]
        for part in self.parts:
            lines.extend([*_markdown(part), ""])
        return "\n".join(lines)

    def files(self) -> Mapping[str, bytes]:
        """``report.html``, ``report.md`` and the figures, by their path."""
        figures = [part for part in self.parts if isinstance(part, Figure)]
        return {
            "report.html": self.as_html().encode(),
            "report.md": self.as_markdown().encode(),
            **{f"{FIGURE_FOLDER}/{figure.name}.png": figure.png for figure in figures},
        }


def _html(part: Part) -> str:
    match part:
        case Heading():
            return f"<h2>{html.escape(part.text)}</h2>"
        case Paragraph():
            kind = ' class="warning"' if part.is_warning else ""
            return f"<p{kind}>{html.escape(part.text)}</p>"
        case Bullets():
            items = "".join(f"<li>{html.escape(item)}</li>" for item in part.items)
            return f"<ul>{items}</ul>"
        case Table():
            return _html_table(part)
        case Figure():
            data = base64.b64encode(part.png).decode()
            caption = html.escape(part.caption)
            kind = ' class="wide"' if part.has_text else ""
            return (
                f'<figure><div><img{kind} alt="{caption}" src="data:image/png;base64,{data}">'
                f"</div><figcaption>{caption}</figcaption></figure>"
            )


def _html_table(table: Table) -> str:
    kind = "table facts" if table.is_facts else "table"
    headings = "".join(f"<th>{html.escape(text)}</th>" for text in table.headings)
    rows = "\n".join(
        _html_row(row, is_marked=index in table.marked) for index, row in enumerate(table.rows)
    )
    return f'<div class="{kind}"><table>\n<tr>{headings}</tr>\n{rows}\n</table></div>'


def _html_row(row: Sequence[str], *, is_marked: bool) -> str:
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
    return f'<tr class="marked">{cells}</tr>' if is_marked else f"<tr>{cells}</tr>"


def _markdown(part: Part) -> Iterator[str]:
    match part:
        case Heading():
            yield f"## {part.text}"
        case Paragraph():
            yield f"> **Warning:** {part.text}" if part.is_warning else part.text
        case Bullets():
            yield from (f"- {item}" for item in part.items)
        case Table():
            yield from markdown_table(
                part.headings,
                [
                    [f"**{cell}**" if cell and index in part.marked else cell for cell in row]
                    for index, row in enumerate(part.rows)
                ],
            )
        case Figure():
            yield f"![{part.caption}]({FIGURE_FOLDER}/{part.name}.png)"
            yield ""
            yield f"*{part.caption}*"
