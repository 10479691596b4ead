"""The texts of a page by place, read from its HTML alone."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br"}

Texts = dict[str, str]
"""Place → text. `tile/coverage/value`, `figure/loss/cell/1/2`, `table/cost/Messages by kind/..."""


class _Node:
    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[_Node | str] = []

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, tag: str, **attributes: str) -> list[_Node]:
        """Return the elements of a tag below, in order, whose attributes contain these words."""
        found = []
        for child in self.children:
            if isinstance(child, _Node):
                words = {k: child.attributes.get(k.rstrip("_"), "").split() for k in attributes}
                if child.tag == tag and all(v in words[k] for k, v in attributes.items()):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = _Node("root", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = _Node(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(_Node(tag, {n: v or "" for n, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        while len(self._open) > 1 and self._open.pop().tag != tag:
            pass

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def texts_of(html: str) -> Texts:
    """Return every text of a page by its place, but for style and script."""
    tree = _Tree()
    tree.feed(html)
    found: Texts = {}
    [body] = tree.root.all("body")
    [header], [main] = body.all("header"), body.all("main")
    found["title"] = header.all("h1")[0].text
    found |= {f"head/{p.attributes['class'].split()[0]}": p.text for p in _paragraphs(header)}
    found |= {f"story/{i}": p.text for i, p in enumerate(_below(header, "div", "story"))}
    for tile in header.all("div", class_="tile"):
        name, value, *note = (c for c in tile.children if isinstance(c, _Node))
        found[f"tile/{name.text}/value"] = value.text
        found |= {f"tile/{name.text}/note": n.text for n in note}
    found |= {f"failure/{i}": li.text for i, li in enumerate(header.all("li"))}
    for section in main.all("section"):
        found |= _section(section, section.attributes["id"])
    [footer] = body.all("footer")
    found["footer"] = footer.text
    return found


def _paragraphs(header: _Node) -> list[_Node]:
    return [p for p in header.all("p") if "class" in p.attributes]


def _below(header: _Node, tag: str, name: str) -> list[_Node]:
    return [p for div in header.all(tag, class_=name) for p in div.all("p")]


def _section(section: _Node, key: str) -> Texts:
    found: Texts = {}
    direct = [c for c in section.children if isinstance(c, _Node)]
    found |= {f"note/{key}/{i}": p.text for i, p in enumerate(c for c in direct if c.tag == "p")}
    for i, command in enumerate(section.all("div", class_="command")):
        found[f"command/{key}/{i}"] = command.all("pre")[0].text
    for figure in section.all("figure"):
        found |= _figure(figure, f"figure/{figure.attributes['id'].removeprefix('figure-')}")
    for cell in section.all("div", class_="cell-of-table"):
        [table] = cell.all("table")
        captions = [caption.text for caption in table.all("caption")]
        found |= _table(table, f"table/{key}/{captions[0] if captions else ''}")
    return found


def _figure(figure: _Node, place: str) -> Texts:
    found = {f"{place}/title": figure.all("h3")[0].text}
    found[f"{place}/note"] = next(c.text for c in figure.all("p", class_="note"))
    [svg] = figure.all("svg")
    marks = [title.text for title in svg.all("title")]
    found |= {f"{place}/mark/{i}": text for i, text in enumerate(marks)}
    ticks = [t for g in svg.all("g", class_="axes") for t in g.all("text")]
    for i, tick in enumerate(ticks):
        x, y = tick.attributes.get("x", "0"), tick.attributes.get("y", "0")
        found[f"{place}/tick/{tick.attributes.get('text-anchor', 'start')},{x},{y},{i}"] = tick.text
    others = [t.text for t in svg.all("text") if t not in ticks]
    found |= {f"{place}/label/{i}": text for i, text in enumerate(others)}
    return found | _table(figure.all("table")[0], place)


def _table(table: _Node, place: str) -> Texts:
    found = {f"{place}/column/{i}": th.text for i, th in enumerate(table.all("th"))}
    for r, row in enumerate(table.all("tbody")[0].all("tr")):
        found |= {f"{place}/cell/{r}/{c}": td.text for c, td in enumerate(row.all("td"))}
    return found
