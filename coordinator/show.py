"""Rounds and fleets as a person reads them: plain lines, wide terminals not assumed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.markup import escape
from rich.table import Table

from broker_config.messages import FROM_IDS, ContextInfo, LinkReport, PredictionError, RoundReport, Stages, Telemetry
from coordinator.fleet import Fleet

STAGE_NAMES = {
    "sender_prefill_s": "sender prefill",
    "encode_s": "encode",
    "transfer_s": "transfer",
    "decode_s": "decode",
    "receiver_prefill_s": "receiver prefill",
}


def rate(bps: float) -> str:
    """12.3 Mbit/s."""
    return f"{bps / 1e6:.1f} Mbit/s" if bps else "unknown rate"


def size(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def seconds(value: float | None) -> str:
    """1.23 s, or a dash."""
    return "–" if value is None else f"{value:.2f} s"


def medium(link: LinkReport) -> str:
    """tokens, or cache at its rung."""
    names = {
        "tokens": "tokens",
        "cache": f"cache {link.rung}",
        "split": f"{link.own_tokens} tokens + cache {link.rung}",
    }
    return names[link.medium]


def stages(predicted: Stages, measured: Stages | None) -> str:
    """transfer 0.21/0.24 s, …: predicted/measured of every stage that either has."""
    said = []
    for field, name in STAGE_NAMES.items():
        expected = getattr(predicted, field)
        got = getattr(measured, field) if measured else None
        if expected >= 0.005 or (got or 0) >= 0.005:
            said.append(f"{name} {expected:.2f}" + ("" if got is None else f"/{got:.2f}") + " s")
    return ", ".join(said) or "nothing to do"


def plan_lines(report: RoundReport) -> Iterator[str]:
    """What was planned: a line for each link."""
    for link in report.links:
        yield (
            f"{link.sender}:{link.context} → {report.receiver}: {medium(link)}; link {rate(link.link_bps)}, "
            f"share {rate(link.share_bps)}, memory pressure {link.sender_pressure:.2f} → {link.receiver_pressure:.2f}"
            + (f" ({link.note})" if link.note else "")
        )


def outcome_lines(report: RoundReport) -> Iterator[str]:
    """What came of it: bytes and stages for each link, then E2E."""
    for link in report.links:
        wire = link.wire_bytes if link.wire_bytes is not None else link.payload_bytes
        yield (
            f"{link.sender}:{link.context}: {size(wire or 0)} on the wire (fp16 cache {size(link.fp16_bytes)}, "
            f"text {size(link.text_bytes)}); predicted/measured {stages(link.predicted, link.measured)}"
            + (f"; {computed}" if (computed := _computed(link)) else "")
            + (f"; {_fallback(link.fallback)}" if link.fallback else "")
            + (f"; {link.note}" if link.note else "")
        )
    question = f"question {report.predicted_question_s:.2f}/{seconds(report.question_s)}"
    deadline = ""
    if report.deadline_s is not None and report.e2e_s is not None:
        verdict = "kept" if report.e2e_s <= report.deadline_s else "MISSED"
        deadline = f"; deadline {report.deadline_s:g} s {verdict}"
    e2e = f"E2E {report.predicted_e2e_s:.2f}/{seconds(report.e2e_s)}"
    if report.e2e_s and report.links:
        e2e += f" ({report.predicted_e2e_s / report.e2e_s - 1:+.0%})"
    revisions = {0: "", 1: "; shares revised once"}.get(report.revisions, f"; shares revised {report.revisions} times")
    yield f"{question}; {e2e}, whole answer {seconds(report.total_s)}{deadline}{revisions}"


def error_lines(errors: Iterable[PredictionError]) -> Iterator[str]:
    """How far predictions of E2E were off: a line for each policy."""
    for error in errors:
        rounds = "1 round" if error.rounds == 1 else f"{error.rounds} rounds"
        yield (
            f"{error.policy}: E2E predicted within {error.median_error:.0%} (median of the last {rounds}, "
            f"predicted less measured {error.median_bias:+.0%})"
        )


def _computed(link: LinkReport) -> str:
    """Tokens that the receiver was to compute, and did, where these differ."""
    if link.computed_tokens in {None, link.own_tokens}:
        return ""
    return f"computed by the receiver {link.own_tokens}/{link.computed_tokens} tokens"


def _fallback(fallback: str) -> str:
    return "FALLBACK to its token ids" if fallback == FROM_IDS else f"FALLBACK to text from {fallback}"


def _kept(context: ContextInfo) -> str:
    """What there is of a context beside its text."""
    if not context.cached:
        return "text"
    return f"cache {context.rung or ''}".rstrip() + ("" if context.cache_bytes else ", on disk")


def _strains(telemetry: Telemetry) -> tuple[str, ...]:
    """What holds the device back now."""
    return telemetry.health.now if telemetry.health else ()


def fleet_table(fleet: Fleet) -> Table:
    """The agents of a site."""
    table = Table(title="agents")
    for column in ("agent", "state", "model", "pressure", "up / down", "round trip", "prefill / decode", "contexts"):
        table.add_column(column)
    for agent, state in sorted(fleet.agents.items()):
        telemetry, model = state.telemetry, state.model
        online = fleet.online(agent, state.last_seen_s)
        if telemetry is None or not online:
            table.add_row(agent, "offline", escape(model.name) if model else "–", *["–"] * 5)
            continue
        link, speed = telemetry.link, telemetry.speed
        table.add_row(
            agent,
            "two agents share this id!"
            if state.duplicate or telemetry.note
            else ", ".join(("online", *_strains(telemetry))),
            escape(f"{model.name} {model.weight_precision}") if model else "–",
            f"{telemetry.memory.pressure:.2f}",
            f"{rate(link.uplink_bps or 0)} / {rate(link.downlink_bps or 0)}",
            f"{link.round_trip_s * 1000:.0f} ms" if link.round_trip_s is not None else "–",
            f"{speed.prefill_tps:.0f} / {speed.decode_tps:.0f} tokens/s" if speed else "–",
            "\n".join(f"{context.name} ({context.tokens} tokens, {_kept(context)})" for context in telemetry.contexts)
            or "none",
        )
    return table
