"""Sentences, words and list items of English text, by rules."""

from __future__ import annotations

import re


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A dot after these never ends a sentence; after the next ones it does before a capital letter.
_TITLES = _listed(
    "mr mrs ms dr prof st mt gen sen rep gov capt lt col sgt rev hon vs e.g i.e cf viz approx ca fig eq sec vol pp "
    "ph.d m.d"
)
_ENDINGS = _listed("etc al a.m p.m inc ltd co corp jr sr jan feb mar apr jun jul aug sep sept oct nov dec")
# Words that begin a sentence after an acronym such as "U.S."; before other capitals the name goes on ("U.S. Army").
_STARTERS = _listed(
    "a an and as at but each every for he her his however i if in it its many most my no one our she so some that the "
    "their then there these they this those to we what when who why you your"
)
# The end of a sentence: its mark, what closes with it, and a blank; or no blank before a capital ("end.Next").
_MARKS, _CLOSING = ".!?\u2026", "\"'\u201d\u2019\u00bb)\\]*_"
_END = re.compile(
    rf"(?<![{_MARKS}])(?P<mark>[{_MARKS}]++)(?P<closing>[{_CLOSING}]*+)"
    r"(?:(?=\s|$)|(?<=\w{3}[.!?])(?=[A-Z][a-z\s]))"
)
_ITEM = re.compile(r"(?P<indent>[ \t]*+)(?:[-*+\u2022]|\d{1,3}[.)])[ \t]+(?=\S)")
_BLOCK = re.compile(rf"\n[ \t]*+\n|\n(?={_ITEM.pattern.replace('?P<indent>', '?:')})")
_HEADING = re.compile(r"^(#{1,6} .*)$", re.MULTILINE)
LONGEST_ABBREVIATION = 40  # characters before a dot that are looked at


def words(text: str) -> list[str]:
    """Returns the words of a text: what blanks and long dashes separate, if it has a letter or a digit."""
    return [word for word in re.split(r"\s+|\u2014+|-{2,}", text) if any(map(str.isalnum, word))]


def list_items(text: str) -> list[str]:
    """Returns the items of lists with bullets (-, *, +, •) or numbers; inner lists do not count."""
    matches = [(match, line) for line in text.splitlines() if (match := _ITEM.match(line))]
    if not matches:
        return []
    depth = min(len(match["indent"].expandtabs()) for match, _ in matches)
    return [line[match.end() :] for match, line in matches if len(match["indent"].expandtabs()) == depth]


def paragraphs(text: str) -> list[str]:
    """Returns the paragraphs of a text, which blank lines separate."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text.

    A sentence ends with . ! ? or an ellipsis, and with its paragraph or list item. Dots in numbers, in abbreviations
    ("e.g.", "Dr.", "U.S.") and after initials do not end one. A mark in quotation marks does not either where the
    sentence goes on in small letters ("Stop!" he said). Without a letter or digit there is no sentence.
    """
    found = []
    for block in _BLOCK.split(_HEADING.sub(r"\n\n\1\n\n", text)):
        block = _ITEM.sub("", block, count=1) if _ITEM.match(block) else block
        start = 0
        for match in _END.finditer(block):
            if _ends(block, match):
                found.append(block[start : match.end()])
                start = match.end()
        found.append(block[start:])
    return [" ".join(part.split()) for part in found if any(map(str.isalnum, part))]


def _ends(block: str, match: re.Match[str]) -> bool:
    """Returns whether a mark ends a sentence, by the word before it and the word after it."""
    rest = block[match.end() :].lstrip().lstrip("\"'(\u201c\u2018\u00ab[*_")
    following = re.match(r"\w+", rest)
    if following is None:
        return True
    small = following[0][0].islower()
    mark = match["mark"]
    trails_off = "\u2026" in mark or (len(mark) > 1 and set(mark) == {"."})
    if small and (match["closing"].strip("*_") or trails_off):
        return False
    if mark != ".":
        return True
    before = re.search(r"[\w.'\u2019-]*$", block[max(match.start() - LONGEST_ABBREVIATION, 0) : match.start()])
    assert before is not None
    word = before[0].lower()
    if word in _TITLES:
        return False
    if word in ("no", "nos") and following[0].isdigit():
        return False
    if word in _ENDINGS:
        return not small and not following[0].isdigit()
    if re.fullmatch(r"(?:[a-z]\.)+[a-z]", word):  # an acronym with its last dot as the mark
        return following[0].lower() in _STARTERS and not small
    is_initial = len(before[0]) == 1 and before[0].isupper() and before[0] != "I"
    return not is_initial
