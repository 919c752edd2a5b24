"""Which questions are asked when: drawn by a seed, or read from a file; and how a patient asker asks them."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from broker_config.messages import DEFAULT_QUALITY_FLOOR, RoundReport
from broker_config.messages.base import AgentId, Question
from broker_config.messages.rounds import Source
from coordinator.errors import RequestRefused
from coordinator.policy.scenario import BYTES_PER_TOKEN, QUESTION_FRAME_TOKENS
from scripts.replay.errors import ScheduleInvalid, SettingInvalid
from scripts.replay.setting import AgentTerms, Place, Setting

LARGEST_FILE_BYTES = 64 * 2**20
AGAIN_S = 1.0
TAIL_S = 10.0
"""The last question is not asked right at the end."""
QUESTION = "What does the report say of the north pump?"


class Asked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One question of a schedule. at_s: from the start on."""

    at_s: Annotated[float, Meta(ge=0, le=1e7)]
    receiver: AgentId
    sources: Annotated[tuple[Source, ...], Meta(min_length=1, max_length=64)]
    question: Question = QUESTION
    deadline_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    quality_floor: Annotated[float, Meta(ge=0, le=1e6)] = DEFAULT_QUALITY_FLOOR
    max_new_tokens: Annotated[int, Meta(ge=1, le=4_096)] = 8


class Taken(NamedTuple):
    """The report of a question's end; how often it was refused before it was taken, and for how long."""

    report: RoundReport
    refused: int = 0
    waited_s: float = 0.0


class Refusals(Exception):
    """A question was refused until its asker's patience was over."""

    def __init__(self, count: int, reason: str) -> None:
        super().__init__(reason)
        self.count = count


def context_name(tokens: int) -> str:
    """Of a context of so many tokens."""
    return f"ctx-{tokens}"


def question_tokens(question: str) -> int:
    """As the planner estimates them."""
    return QUESTION_FRAME_TOKENS + -(-len(question.encode()) // BYTES_PER_TOKEN)


def schedule(place: Place, groups: Sequence[Sequence[str]], seed: int) -> tuple[Asked, ...]:
    """In the order of their times. Raises ScheduleInvalid, SettingInvalid."""
    terms = place.setting.requests
    if terms.file is not None:
        return read_schedule(place.folder / terms.file, place.setting)
    agents = {agent.name: agent for agent in place.setting.agents}
    drawn = [
        asked
        for group in groups
        for asked in _drawn(place.setting, [agents[name] for name in group], random.Random(f"{seed} {group[0]}"))
    ]
    if not drawn:
        raise SettingInvalid("nobody but a receiver itself holds contexts: nothing can be asked")
    return tuple(sorted(drawn, key=lambda asked: asked.at_s))


def _drawn(setting: Setting, group: Sequence[AgentTerms], dice: random.Random) -> Iterator[Asked]:
    """The questions of one group."""
    terms = setting.requests
    kinds = [
        (receiver, length, min(count, len(holders)))
        for receiver in group
        for length in sorted({tokens for agent in group for tokens in agent.contexts})
        for count in terms.sources
        if (holders := _holders(group, receiver, length))
    ]
    if not kinds:
        return
    dice.shuffle(kinds)
    room_s = max(0.0, setting.duration_s - terms.first_s - min(TAIL_S, (setting.duration_s - terms.first_s) / 10))
    for index, (receiver, length, count) in zip(range(terms.count), itertools.cycle(kinds), strict=False):
        holders = dice.sample(_holders(group, receiver, length), count)
        timed = terms.deadline_every and index % terms.deadline_every == 0
        yield Asked(
            at_s=terms.first_s + (index + dice.random()) * room_s / terms.count,
            receiver=receiver.name,
            sources=tuple(f"{agent.name}:{context_name(length)}" for agent in holders),
            deadline_s=terms.deadline_s + terms.deadline_token_s * length * count if timed else None,
            quality_floor=terms.quality_floor,
            max_new_tokens=terms.max_new_tokens,
        )


def _holders(group: Sequence[AgentTerms], receiver: AgentTerms, length: int) -> list[AgentTerms]:
    return [agent for agent in group if agent is not receiver and length in agent.contexts]


def read_schedule(path: Path, setting: Setting) -> tuple[Asked, ...]:
    """From JSON Lines, in the order of their times. Raises ScheduleInvalid, which names the line."""
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise ScheduleInvalid(path, 0, f"has more than {LARGEST_FILE_BYTES} bytes")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ScheduleInvalid(path, 0, f"can't be read: {error.strerror}") from None
    held = {agent.name: {context_name(tokens) for tokens in agent.contexts} for agent in setting.agents}
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            asked = msgspec.json.decode(line, type=Asked)
        except (ValueError, RecursionError) as error:
            raise ScheduleInvalid(path, number, str(error)) from None
        if wrong := _wrong(asked, held):
            raise ScheduleInvalid(path, number, wrong)
        if asked.at_s >= setting.duration_s:
            raise ScheduleInvalid(path, number, f"at_s {asked.at_s:g} is not before the end at {setting.duration_s:g}")
        found.append(asked)
    if not found:
        raise ScheduleInvalid(path, 0, "holds no question")
    return tuple(sorted(found, key=lambda asked: asked.at_s))


def _wrong(asked: Asked, held: Mapping[str, set[str]]) -> str:
    """Why it can't be asked of agents that hold these contexts, or ""."""
    for name in (asked.receiver, *(source.partition(":")[0] for source in asked.sources)):
        if name not in held:
            return f"there is no agent {name}; there are {', '.join(sorted(held))}"
    for source in asked.sources:
        name, _, context = source.partition(":")
        if context and context not in held[name]:
            return f"{name} holds no {context}; it holds {', '.join(sorted(held[name])) or 'nothing'}"
    return "it names a source twice" if len(set(asked.sources)) < len(asked.sources) else ""


async def patiently(ask: Callable[[], Awaitable[RoundReport]], patience_s: float) -> Taken:
    """Ask until it is taken. Raises Refusals."""
    clock, refused = asyncio.get_running_loop().time, 0
    began_s = clock()
    until_s = began_s + patience_s
    while True:
        try:
            asked_s = clock()
            return Taken(await ask(), refused, asked_s - began_s)
        except RequestRefused as error:
            refused += 1
            if clock() + AGAIN_S > until_s:
                raise Refusals(refused, str(error)) from None
            await asyncio.sleep(AGAIN_S)
