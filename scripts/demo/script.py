"""What the demo asks, and under which links: the play, apart from the stage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from broker_config.messages import DEFAULT_QUALITY_FLOOR
from coordinator.policy import PressureCaps

DOCUMENTS = Path(__file__).parent / "documents"
SENDERS = {"pi-1": "site-north", "pi-2": "site-south"}
RECEIVER = "jetson-1"
AGENTS = (*SENDERS, RECEIVER)

POLICIES = ("optimum", "jmsra", "token", "kv")
"""The first is told in full; the others answer the same question under the same links, memory and quality floor."""
ORDERS = ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1))
"""In four questions each policy comes once in every place and once behind every other (Williams' design)."""

FILLED = "pi-2"
"""The agent whose cache budget is filled while the demo runs."""
CACHE_BUDGET_MB = 72.0
MEGABIT = 1e6
STRICT = 0.005
"""A quality floor that klt2 keeps and klt3 does not."""
SECTION_WORDS = 90
"""Small enough that a memory fills in steps of a few per cent."""


class Question(Struct, frozen=True, kw_only=True):
    """A question about the documents; the answer is right if it holds one of `expected` (lower case)."""

    question: str
    sources: Annotated[tuple[str, ...], Meta(min_length=1)]
    expected: Annotated[tuple[str, ...], Meta(min_length=1)]

    def right(self, answer: str) -> bool:
        """Whether an answer holds the expected fact."""
        return any(fact in answer.lower() for fact in self.expected)


class Act(Struct, frozen=True, kw_only=True):
    """Questions under one state of links and memory.

    rates_mbps: each agent's access link, both directions. fill: raise the memory pressure of FILLED to this first.
    tighten: give it so much to hold that its own document's cache is tightened.
    """

    title: str
    rates_mbps: dict[str, float]
    questions: tuple[Question, ...]
    fill: float | None = None
    tighten: bool = False
    quality_floor: float = DEFAULT_QUALITY_FLOOR


def acts() -> tuple[Act, ...]:
    """Fourteen questions, from slow links to fast ones, then a stricter one under a filling memory."""
    path = DOCUMENTS / "questions.json"
    asked = msgspec.json.decode(path.read_bytes(), type=tuple[Question, ...])
    one, two = [q for q in asked if len(q.sources) == 1], [q for q in asked if len(q.sources) > 1]
    memory = next(q for q in one if q.sources == (FILLED,))
    fast = {"pi-1": 120.0, "pi-2": 120.0, RECEIVER: 200.0}
    caps = PressureCaps()
    return (
        Act(
            title="slow links: a split is faster than tokens and than a cache",
            rates_mbps={"pi-1": 4.0, "pi-2": 6.0, RECEIVER: 10.0},
            questions=(one[0], one[3], two[0]),
        ),
        Act(
            title="links between slow and fast: tokens and caches take as long, a split takes less",
            rates_mbps={"pi-1": 12.0, "pi-2": 15.0, RECEIVER: 25.0},
            questions=(one[1], one[4], two[1]),
        ),
        Act(
            title="one link gets fast: what travels differs by link",
            rates_mbps={"pi-1": 120.0, "pi-2": 5.0, RECEIVER: 200.0},
            questions=(one[1], two[1]),
        ),
        Act(title="fast links: caches are faster", rates_mbps=fast, questions=(one[2], one[4], two[2])),
        Act(
            title=f"the same links and a question that matters more: at most {STRICT} nats lost",
            rates_mbps=fast,
            questions=(memory,),
            quality_floor=STRICT,
        ),
        Act(
            title=f"pages fill {FILLED}'s memory past 0.70: at most {caps.at_most(0.70):g} bits an element, too few",
            rates_mbps=fast,
            questions=(memory,),
            fill=0.70,
            quality_floor=STRICT,
        ),
        Act(
            title=f"more pages than {FILLED} has room for: caches tighten where they are kept, longest unused first",
            rates_mbps=fast,
            questions=(memory,),
            tighten=True,
        ),
    )


def in_turn(question: int) -> tuple[str, ...]:
    """In which order the policies answer the question of that number: what one leaves behind, the next pays for."""
    return tuple(POLICIES[place] for place in ORDERS[question % len(ORDERS)])


def pages() -> list[tuple[str, str]]:
    """(name, text) of the sections of the pages, in order: what fills a memory. A section is whole sentences."""
    sections = []
    for path in sorted((DOCUMENTS / "pages").glob("*.txt")):
        words: list[str] = []
        number = 1
        for sentence in re.split(r"(?<=[.!?])\s+", path.read_text(encoding="utf-8").strip()):
            words += sentence.split()
            if len(words) >= SECTION_WORDS:
                sections.append((f"{path.stem}-{number}", " ".join(words)))
                words, number = [], number + 1
    return sections
