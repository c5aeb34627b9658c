"""The running text of HTML pages: paragraphs with white space collapsed, without the parts that a subclass skips."""

from __future__ import annotations

from html.parser import HTMLParser


class RunningText(HTMLParser):
    """Collects `paragraphs`; a subclass says which tags break them and which hold no running text."""

    BREAKS: frozenset[str]
    """Tags that begin or end a paragraph."""
    SKIPPED: frozenset[str]
    """Tags whose text is left out."""
    VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._words: list[str] = []
        self._open: list[tuple[str, bool]] = []  # tags, and whether their text is skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BREAKS:
            self.end_paragraph()
        if tag not in self.VOID:
            self._open.append((tag, self.skips(tag, dict(attrs)) or bool(self._open and self._open[-1][1])))

    def skips(self, tag: str, attrs: dict[str, str | None]) -> bool:
        """Whether the text within such a tag is left out."""
        return tag in self.SKIPPED

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BREAKS:
            self.end_paragraph()

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BREAKS:
            self.end_paragraph()
        for index in range(len(self._open) - 1, -1, -1):
            if self._open[index][0] == tag:
                del self._open[index:]
                break

    def handle_data(self, data: str) -> None:
        if not (self._open and self._open[-1][1]):
            self._words.append(data)

    def end_paragraph(self) -> None:
        """What was read since the last one is a paragraph, if it is anything."""
        text = " ".join("".join(self._words).split())
        self._words.clear()
        if text:
            self.paragraphs.append(text)
