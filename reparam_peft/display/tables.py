"""Tables as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence


def html_table(rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table in HTML, the first row of which is the head, with a caption below; everything is escaped."""
    head, *body = [[html.escape(str(cell)) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    top = "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"
    return f"<table><thead>{top}</thead><tbody>{''.join(lines)}</tbody></table><p>{html.escape(caption)}</p>"
