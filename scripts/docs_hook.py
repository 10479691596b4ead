"""Hook of MkDocs: a link to a file outside docs/ becomes its text; the site has no such page."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)\s]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's Markdown without links that leave docs/."""
    return OUTSIDE.sub(r"\1", markdown)
