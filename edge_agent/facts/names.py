"""Names by their capitals: what can be had of entities without a language model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from msgspec import Struct

from edge_agent.facts.fact import VALUED, Fact, cut

MAX_WORDS = 8

_WORD = re.compile(r"\w{1,64}+(?:['’&.-]\w{1,64}+)*")
# Between two capitalised words of one name there is a blank, after an initial or a title also a full stop.
_INSIDE = re.compile(r"[ ]|\.[ ]|[ ]&[ ]")
_BRACKETS = " \"'“”‘’()[]*#-–—"
_TITLES = frozenset(
    {"Mr", "Mrs", "Ms", "Dr", "St", "Prof", "Sir", "Lt", "Col", "Gen", "Capt", "Sgt", "Rev", "Jr", "Mt"}
)
_LINKS = frozenset(
    {"of", "de", "la", "le", "du", "des", "van", "von", "der", "den", "di", "da", "del", "al", "bin", "the"}
)
# Capitals of these say where a sentence begins, not a name.
_FUNCTION = frozenset(
    """
    a about after all also although among an and another any are as at because before both but by can despite did do
    does during each either even every few finally first for from had has have he her here his how however i if in
    instead is it its just later like many may me meanwhile more most much my neither never next no nor not now of often
    on once one only or other others our out over people perhaps several she should since so some soon still such than
    that the their them then there therefore these they this those though three through thus to today two under unlike
    until up upon was we were what when where whether which while who whom whose why will with within without would yes
    yet you your
    """.split()  # noqa: SIM905 words are easier to read than 130 pairs of quotes
)


class Word(Struct, frozen=True):
    """A word and where it stands. opens: it begins a sentence or a line."""

    text: str
    start: int
    end: int
    capital: bool
    opens: bool


def words(text: str) -> list[Word]:
    """The words of a text."""
    found: list[Word] = []
    for match in _WORD.finditer(text):
        before = found[-1] if found else None
        opens = before is None or _opens(before, text[before.end : match.start()])
        found.append(Word(match[0], match.start(), match.end(), match[0][0].isupper(), opens))
    return found


def _opens(before: Word, between: str) -> bool:
    if "\n" in between:
        return True
    if before.text in _TITLES or (before.capital and len(before.text) == 1):
        return False  # the full stop belongs to "Dr." or to an initial
    return between.strip(_BRACKETS)[-1:] in {".", "!", "?", ":"}


def runs(text: str) -> Iterator[list[Word]]:
    """Runs of capitalised words that are names, links such as "of" among them."""
    every = words(text)
    small = {word.text for word in every if not word.capital}
    inside = Counter(word.text for word in every if word.capital and not word.opens)
    run: list[Word] = []
    links: list[Word] = []
    for word in every:
        joined = (
            bool(run) and _INSIDE.fullmatch(text, (links or run)[-1].end, word.start) is not None and not word.opens
        )
        if joined and word.capital and len(run) < MAX_WORDS and word.text.lower() not in _FUNCTION:
            run += [*links, word]
            links = []
        elif joined and word.text in _LINKS and len(links) < 2:
            links.append(word)
        else:
            yield from _named(run, small, inside)
            run, links = ([word] if word.capital else []), []
    yield from _named(run, small, inside)


def _named(run: list[Word], small: set[str], inside: Counter[str]) -> Iterator[list[Word]]:
    """The run without the words before its name, if a name is left."""
    while run and (not run[0].capital or _only_opens(run[0], small)):
        run = run[1:]
    if len(run) > 1 or (run and len(run[0].text) > 1 and (not run[0].opens or inside[run[0].text])):
        yield run


def _only_opens(word: Word, small: set[str]) -> bool:
    """Whether a word has its capital from its place: it is grammar, or stands elsewhere without one."""
    lower = word.text.lower()
    return lower in _FUNCTION or (word.opens and lower in small)


def names(text: str) -> list[Fact]:
    """Names of persons, places, works: facts of type entity, detail "name"."""
    found = []
    for run in runs(text):
        fact = cut(text, run[0].start, run[-1].end, "entity", confidence=VALUED, detail="name")
        if fact is not None:
            found.append(fact)
    return found
