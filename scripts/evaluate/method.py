"""Methods: what a receiver is given of the context. A name is `text`, `none`, a recipe's or a peer's, maybe with
`+facts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_agent.errors import RecipeInvalid
from edge_agent.kv.backfill import RANKS
from edge_agent.kv.recipe import Recipe, recipe
from scripts.evaluate.errors import MethodUnknown
from scripts.peers.groups import grouped
from scripts.peers.method import Method as Codec

TEXT, NONE = "text", "none"
FACTS = "+facts"
PAPER = tuple(f"qkvcomm-{target}{facts}" for target in (4, 6, 8) for facts in ("", FACTS))
OURS = tuple(f"klmix{target}-k70-whole" for target in (4, 6, 8))
PEERS = {
    peer.name: peer
    for peer in (
        grouped("group-4", bits=4),
        grouped("group-2", bits=2),
        grouped("kivi-2", bits=2, keys="tokens"),
    )
}
"""Quantization by groups: llama.cpp's at 4 and 2 bits, and KIVI's at 2, without the last tokens that it keeps whole."""
GROUPS = {
    "table": (TEXT, NONE, f"{NONE}{FACTS}", "fp16", "q8", "q6", "q4", *PAPER, *OURS),
    "parts": (
        *(f"{name}{FACTS}" for name in ("fp16", "q8", "q6", "q4")),
        "q4-whole",
        "mix6-whole",
        "mix4-whole",
        "fp16-l70",
        "fp16-k70",
    ),
    "eviction": (
        TEXT,
        NONE,
        *(
            f"fp16-{by}{share}{filled}"
            for by, rank in (("e", RANKS["layer"]), ("h", RANKS["head"]))
            for filled in ("", f"-b{rank}")
            for share in (50, 30, 20, 10, 5)
        ),
    ),
    "codec": (
        *(TEXT, NONE, "fp16", "q8", "q6", "q4", "mix6-whole"),
        *PEERS,
        *(f"klt{level}" for level in range(10)),
    ),
}
"""table: the paper's pipeline with and without facts, ours at the same size, and the baselines. parts: the pipeline's
steps one by one, and facts beside uniform widths. codec: the transform at every level of the ladder, beside plain
widths, the paper's mix with all layers, and peers. eviction: 5 to 50 % of the entries, chosen by layer and by head,
with and without backfill.
"""


@dataclass(frozen=True)
class Method:
    """recipe: ours, and peer: theirs; text and none have neither. facts: they stand before the question."""

    name: str
    recipe: Recipe | None
    facts: bool
    peer: Codec[Any] | None = None

    @property
    def text(self) -> bool:
        """Whether the receiver reads the context itself."""
        return self.name.removesuffix(FACTS) == TEXT

    @property
    def cache(self) -> bool:
        """Whether the receiver is sent the context's cache."""
        return self.recipe is not None or self.peer is not None


def named(given: str) -> tuple[str, ...]:
    """The methods of a list with commas, in which a group stands for its methods; none twice. Raises MethodUnknown."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    found = tuple(dict.fromkeys(each for name in names for each in GROUPS.get(name, (name,))))
    if not found:
        raise MethodUnknown("--methods names none")
    for name in found:
        method(name)
    return found


def method(name: str) -> Method:
    """The method of a name. Raises MethodUnknown."""
    what = name.removesuffix(FACTS)
    if what in {TEXT, NONE}:
        return Method(name, None, name != what)
    if what in PEERS:
        return Method(name, None, name != what, PEERS[what])
    try:
        return Method(name, recipe(what), name != what)
    except RecipeInvalid as error:
        raise MethodUnknown(
            f"{name}: {error}; besides these, {', '.join(PEERS)}, {TEXT} and {NONE}, each with {FACTS} or without"
        ) from None
