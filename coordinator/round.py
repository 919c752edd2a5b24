"""One round: from a plan to orders, and from outcomes to its report. No I/O, no clock; times are passed in."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import msgspec

from broker_config.messages import (
    AnswerOrder,
    AnswerOutcome,
    AnswerPiece,
    Ask,
    ContextInfo,
    LinkReport,
    Part,
    PartOutcome,
    RoundReport,
    SendOrder,
    SendOutcome,
    SendProgress,
    Stages,
    new_id,
)
from broker_config.messages.base import RungName
from coordinator.drift import Drift, Rule
from coordinator.fleet import Fleet
from coordinator.policy import LinkPlan, RequestPlan
from coordinator.probing import Probing

LEAST_PART_TIMEOUT_S = 4.0
PART_TIMEOUT_FACTOR = 3.0
UNMEASURED_PART_TIMEOUT_S = 30.0
"""A part is given up after PART_TIMEOUT_FACTOR times its predicted arrival; before anything is measured, after this."""

LEAST_CHUNK_BYTES, SMALL_CHUNK_BYTES, LARGE_CHUNK_BYTES = 16 * 1024, 64 * 1024, 256 * 1024
SLOWEST_LINK_BPS, SLOW_LINK_BPS = 5e6, 50e6
"""Under it chunks are small: 256 KiB would hold a slow link for longer than anything else should wait, and of few large
ones nothing can be told of its rate while they go."""

ALONE_SHARE = 0.99
REVISED = "share revised to"

EndOfRound = Literal["answered", "failed", "cancelled", "expired"]


@dataclass(frozen=True, kw_only=True)
class LocalSource:
    """A context that the receiver holds itself: nothing travels.

    least: the least faithful rung at which it may be kept to be used as it is; rung: at which it is then used.
    """

    context: ContextInfo
    pressure: float
    least: RungName
    rung: RungName


@dataclass(kw_only=True)
class Round:
    """A question under way. The service feeds it what arrives.

    `done` is set when the receiver has told the end, or when the round was stopped; whichever came first counts.
    receiver_instance: the receiver as it was when the round was planned; another one knows nothing of it. factors,
    overhead_s: what was learned of links and receiver when it was. revised: transfers whose shares have changed since.
    reporting: what senders last said of how far theirs are; probing: those that were found slow. shared_by: those
    that had their shares in the last revision.
    """

    ask: Ask
    policy: str
    accepted_s: float
    receiver_instance: str
    plan: RequestPlan | None
    sources: tuple[LinkPlan | LocalSource, ...]
    holders: Mapping[str, tuple[str, ...]]
    factors: Mapping[tuple[str, str], float] = field(default_factory=dict)
    overhead_s: float = 0.0
    rule: Rule = field(default_factory=Rule)
    transfers: tuple[str, ...] = ()
    revised: set[str] = field(default_factory=set)
    revisions: int = 0
    reporting: dict[str, SendProgress] = field(default_factory=dict)
    probing: Probing = field(default_factory=Probing)
    shared_by: frozenset[str] = frozenset()
    first_piece_s: float | None = None
    answered_s: float | None = None
    sends: dict[str, SendOutcome] = field(default_factory=dict)
    answer: AnswerOutcome | None = None
    stopped: tuple[EndOfRound, str] | None = None
    next_piece: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)
    sent: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.transfers = tuple(new_id() for _ in self.sources)
        self.drift = Drift(
            rule=self.rule,
            accepted_s=self.accepted_s,
            predicted_s=self.plan.predicted_e2e_s if self.plan else 0.0,
            references={transfer: link.link_bps for transfer, link in self.running()},
        )

    @cached_property
    def agents(self) -> tuple[str, ...]:
        """Everybody who has an order in this round."""
        return tuple(dict.fromkeys((self.ask.receiver, *(link.sender for link in self.links))))

    @property
    def links(self) -> tuple[LinkPlan, ...]:
        """The sources that travel."""
        return tuple(source for source in self.sources if isinstance(source, LinkPlan))

    def running_links(self) -> tuple[LinkPlan, ...]:
        """Links whose transfer has not ended: what they occupy is not free."""
        return tuple(link for _, link in self.running())

    def running(self) -> tuple[tuple[str, LinkPlan], ...]:
        """(transfer, link) of those."""
        if self.answer is not None:
            return ()
        return tuple(
            (transfer, source)
            for source, transfer in zip(self.sources, self.transfers, strict=True)
            if isinstance(source, LinkPlan) and transfer not in self.sends
        )

    def revise(self, transfer: str, share_bps: float) -> None:
        """A transfer under way has another share from now on."""
        self.revised.add(transfer)
        self.sources = tuple(
            _revised(source, share_bps) if at == transfer and isinstance(source, LinkPlan) else source
            for source, at in zip(self.sources, self.transfers, strict=True)
        )

    def transferred(self) -> list[tuple[LinkPlan, SendOutcome]]:
        """Links whose transfers have ended, with how; without those whose share was revised under way."""
        return [
            (source, self.sends[transfer])
            for source, transfer in zip(self.sources, self.transfers, strict=True)
            if isinstance(source, LinkPlan) and transfer in self.sends and transfer not in self.revised
        ]

    def factor(self, link: LinkPlan) -> float:
        """By which the plan multiplied the measured rate of a link."""
        return self.factors.get((link.sender, link.receiver), 1.0)

    def send_orders(self, expires_s: float) -> list[tuple[str, SendOrder]]:
        """(agent, order) for every sender."""
        return [
            (
                source.sender,
                SendOrder(
                    request=self.ask.request,
                    transfer=transfer,
                    context_id=source.context_id,
                    receiver=self.ask.receiver,
                    own_tokens=source.own_tokens,
                    rung=source.rung,
                    meet=source.meet,
                    facts_tokens=self.ask.facts_tokens,
                    expires_s=expires_s,
                    chunk_bytes=_chunk_bytes(source.link_bps),
                    rate_bps=source.share_bps if self.paced(source) else None,
                    later_rates=source.later_rates if self.paced(source) else (),
                ),
            )
            for source, transfer in zip(self.sources, self.transfers, strict=True)
            if isinstance(source, LinkPlan)
        ]

    def answer_order(self, expires_s: float) -> AnswerOrder:
        """The receiver's order."""
        return AnswerOrder(
            request=self.ask.request,
            asker=self.ask.client,
            question=self.ask.question,
            parts=tuple(self._part(*pair) for pair in zip(self.sources, self.transfers, strict=True)),
            part_timeout_s=min(expires_s, self.part_timeout_s()),
            expires_s=expires_s,
            max_new_tokens=self.ask.max_new_tokens,
        )

    def part_timeout_s(self) -> float:
        """How long a part may take before its receiver computes it, or fetches its text, instead."""
        if any(not link.known for link in self.links):
            return UNMEASURED_PART_TIMEOUT_S
        latest_s = max((link.arrive_s for link in self.links), default=0.0)
        return max(LEAST_PART_TIMEOUT_S, PART_TIMEOUT_FACTOR * latest_s)

    def still_sending(self) -> tuple[str, ...]:
        """Senders that have not told how their transfers ended."""
        senders = self._senders().items()
        return tuple(dict.fromkeys(sender for transfer, sender in senders if transfer not in self.sends))

    def take_send(self, outcome: SendOutcome) -> None:
        """A sender has ended one of this round's transfers (others, such as fetched texts, are not planned links)."""
        if self._senders().get(outcome.transfer) == outcome.agent:
            self.sends.setdefault(outcome.transfer, outcome)
        if len(self.sends) == len(self.links):
            self.sent.set()

    def take_piece(self, piece: AnswerPiece, now_s: float) -> bool:
        """A piece of the answer. Whether it is news: another agent's, or one that came before, is not (QoS 1)."""
        if piece.agent != self.ask.receiver or piece.index < self.next_piece:
            return False
        self.next_piece = piece.index + 1
        self.first_piece_s = self.first_piece_s if self.first_piece_s is not None else now_s
        return True

    def take_answer(self, outcome: AnswerOutcome, now_s: float) -> None:
        """The receiver has ended."""
        if outcome.agent == self.ask.receiver and not self.done.is_set():
            self.answer, self.answered_s = outcome, now_s
            self.done.set()

    def stop(self, state: EndOfRound, reason: str) -> None:
        """Nobody waits for the receiver any more."""
        if not self.done.is_set():
            self.stopped = (state, reason)
            self.done.set()

    def receiver_gone(self, fleet: Fleet, now_s: float, *, listening_since_s: float, expiry_s: float) -> str:
        """Why the receiver will never answer, or "".

        It was started anew, and so knows nothing of its order; or it could have been heard for expiry_s and was not.
        That it, or its will, said "offline" is not enough: it may be back in a moment, its work still going on.
        """
        receiver = self.ask.receiver
        state = fleet.agents.get(receiver)
        if state is not None and state.instance != self.receiver_instance:
            return f"{receiver} was restarted while it was answering; ask again"
        heard_s = max(state.last_seen_s, listening_since_s) if state else listening_since_s
        if now_s - heard_s > expiry_s:
            return f"{receiver} went offline while it was answering; ask again when it is back"
        return ""

    def report(self, state: Literal["planned"] | EndOfRound, reason: str = "") -> RoundReport:
        """As things stand."""
        answer = self.answer
        plan = self.plan
        parts = {part.transfer: part for part in answer.parts} if answer else {}
        answered = state == "answered"
        return RoundReport(
            request=self.ask.request,
            question=self.ask.question,
            receiver=self.ask.receiver,
            policy=self.policy,
            state=state,
            links=tuple(
                _link_report(source, self.ask.receiver, self.sends.get(transfer), parts.get(transfer))
                for source, transfer in zip(self.sources, self.transfers, strict=True)
            ),
            quality_floor=self.ask.quality_floor,
            deadline_s=self.ask.deadline_s,
            predicted_e2e_s=plan.predicted_e2e_s if plan else 0.0,
            predicted_question_s=plan.predicted_question_s if plan else 0.0,
            e2e_s=None if self.first_piece_s is None else self.first_piece_s - self.accepted_s,
            total_s=None if self.answered_s is None else self.answered_s - self.accepted_s,
            question_s=answer.question_s if answer and answered else None,
            answer=answer.answer if answer else "",
            answer_tokens=answer.answer_tokens if answer else 0,
            fallbacks=sum(bool(part.fallback) for part in parts.values()),
            revisions=self.revisions,
            reason=(reason or (answer.reason if answer else ""))[:1024],
        )

    def _senders(self) -> dict[str, str]:
        """Who sends each transfer that travels."""
        pairs = zip(self.sources, self.transfers, strict=True)
        return {transfer: source.sender for source, transfer in pairs if isinstance(source, LinkPlan)}

    def _part(self, source: LinkPlan | LocalSource, transfer: str) -> Part:
        if isinstance(source, LocalSource):
            context = source.context
            return Part(
                transfer=transfer,
                sender=self.ask.receiver,
                context_id=context.context_id,
                tokens=context.tokens,
                own_tokens=0,
                rung=source.least,
            )
        return Part(
            transfer=transfer,
            sender=source.sender,
            context_id=source.context_id,
            tokens=source.tokens,
            own_tokens=source.own_tokens,
            meet=source.meet,
            due_s=source.arrive_s if source.meet and source.known else 0.0,
            rung=source.rung,
            text_holders=tuple(self.holders.get(source.context_id, ())),
        )

    def paced(self, link: LinkPlan) -> bool:
        """Whether others use a channel of this link. One that has all to itself is not slowed to what was measured."""
        shared = len(self.links) > 1 or bool(link.later_rates)
        return link.share_bps > 0 and (shared or link.share_bps < ALONE_SHARE * link.link_bps)


def _chunk_bytes(link_bps: float) -> int:
    if link_bps < SLOWEST_LINK_BPS:
        return LEAST_CHUNK_BYTES
    return SMALL_CHUNK_BYTES if link_bps < SLOW_LINK_BPS else LARGE_CHUNK_BYTES


def unfinished(ask: Ask, policy: str, reason: str) -> RoundReport:
    """Of a question whose round is not known any more."""
    return RoundReport(
        request=ask.request,
        question=ask.question,
        receiver=ask.receiver,
        policy=policy,
        state="failed",
        quality_floor=ask.quality_floor,
        deadline_s=ask.deadline_s,
        reason=reason,
    )


def _revised(link: LinkPlan, share_bps: float) -> LinkPlan:
    """The same with another share, and a note of the last one."""
    kept = [note for note in link.note.split("; ") if note and not note.startswith(REVISED)]
    note = "; ".join([*kept, f"{REVISED} {share_bps / 1e6:.1f} Mbit/s"])
    return replace(link, share_bps=share_bps, later_rates=(), note=note)


def _link_report(
    source: LinkPlan | LocalSource, receiver: str, send: SendOutcome | None, part: PartOutcome | None
) -> LinkReport:
    report = source.report() if isinstance(source, LinkPlan) else _local_report(source, receiver)
    if send is None and part is None:
        return report
    failures: Sequence[str] = [
        f"{who} {outcome.state}: {outcome.reason}"
        for who, outcome in (("sender", send), ("receiver", part))
        if outcome is not None and outcome.reason
    ]
    return msgspec.structs.replace(
        report,
        measured=Stages(
            sender_prefill_s=send.prefill_s if send else 0.0,
            encode_s=send.encode_s if send else 0.0,
            transfer_s=send.transfer_s if send else part.receive_s if part else 0.0,
            decode_s=part.decode_s if part else 0.0,
            receiver_prefill_s=part.prefill_s if part else 0.0,
        ),
        payload_bytes=part.payload_bytes if part else None,
        wire_bytes=send.wire_bytes if send else None,
        computed_tokens=part.own_tokens if part else None,
        fallback=part.fallback if part else "",
        note="; ".join([report.note] * bool(report.note) + list(failures))[:1024],
    )


def _local_report(source: LocalSource, receiver: str) -> LinkReport:
    context = source.context
    return LinkReport(
        sender=receiver,
        context=context.name,
        context_id=context.context_id,
        tokens=context.tokens,
        own_tokens=0,
        medium="cache",
        rung=source.rung,
        link_bps=0.0,
        share_bps=0.0,
        sender_pressure=source.pressure,
        receiver_pressure=source.pressure,
        planned_bytes=0,
        fp16_bytes=0,
        text_bytes=0,
        predicted=Stages(),
        note="held by the receiver itself: nothing travels",
    )
