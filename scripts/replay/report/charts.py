"""The figures, each a Vega-Lite specification made of results alone. Colours are fit for light and dark pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from scripts.replay.findings import Paired, by_name, cdf
from scripts.replay.results import AgentSeconds, QuestionResult, Result
from scripts.replay.tables import trace_name

Spec = dict[str, Any]
Rows = list[dict[str, Any]]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
POLICIES = {"optimum": "#3b82d6", "jmsra": "#e4572e", "token": "#d99a00", "kv": "#2aa198"}
OTHERS = ("#b15fd0", "#8a8a8a", "#c2607a", "#6b8e23")
MEDIA = {"tokens": "#d99a00", "split": "#3b82d6", "cache": "#2aa198"}
KEPT = {"as computed": "#3b82d6", "coded": "#d99a00", "none": "#8a8a8a"}
COLUMNS, PANEL = 3, 260
WIDE, TALL = 860, 180
MOST_POINTS = 400
"""Of a line; what has more is thinned."""
MEGABYTE = 1e6


def e2e(results: Sequence[Result]) -> Spec:
    """Which share of the questions was answered within so many seconds, a panel a trace."""
    rows: Rows = []
    for trace, group in _by_trace(results):
        for policy in _policies(results):
            seconds, shares = cdf(group, policy)
            for at in _thinned(len(seconds)):
                rows.append({"trace": trace, "policy": policy, "e2e": seconds[at], "share": shares[at]})
    return _panels(
        rows,
        {"type": "line", "interpolate": "step-after", "strokeWidth": 2},
        {
            "x": _quantity("e2e", "E2E, s", scale={"type": "log"}, axis={"tickCount": 4}),
            "y": _quantity("share", "questions answered", axis={"format": "%"}, scale={"domain": [0, 1]}),
            "color": _policy_colour(results),
            "tooltip": _tooltip("policy", ("e2e", ".2f"), ("share", ".0%")),
        },
    )


def sent(results: Sequence[Result]) -> Spec:
    """Megabytes by medium, a panel a trace."""
    rows = [
        {
            "trace": trace,
            "policy": policy,
            "medium": medium,
            "MB": sum(
                link.sent_bytes
                for result in group
                if result.policy == policy
                for question in result.questions
                for link in question.links
                if link.medium == medium
            )
            / MEGABYTE,
        }
        for trace, group in _by_trace(results)
        for policy in _policies(results)
        for medium in MEDIA
    ]
    return _panels(
        rows,
        {"type": "bar"},
        {
            "y": {"field": "policy", "type": "nominal", "sort": list(_policies(results)), "title": None},
            "x": _quantity("MB", "MB sent"),
            "color": _named("medium", MEDIA),
            "tooltip": _tooltip("policy", "medium", ("MB", ".1f")),
        },
        height=26 * len(_policies(results)),
        own_x=True,
    )


def misses(results: Sequence[Result]) -> Spec:
    """Share of the deadlines that were missed, a panel a trace."""
    rows = [
        {"trace": group.name, "policy": each.policy, "missed": each.missed / each.timed, "of": each.timed}
        for group in by_name(results, trace_name)
        for each in group.figures
        if each.timed
    ]
    return _panels(
        rows,
        {"type": "bar"},
        {
            "y": {"field": "policy", "type": "nominal", "sort": list(_policies(results)), "title": None},
            "x": _quantity("missed", "deadlines missed", axis={"format": "%"}, scale={"domain": [0, 1]}),
            "color": _policy_colour(results, legend=False),
            "tooltip": _tooltip("policy", ("missed", ".0%"), ("of", "d")),
        },
        height=26 * len(_policies(results)),
    )


def predictions(results: Sequence[Result]) -> Spec:
    """Predicted and measured E2E of each question."""
    rows: Rows = [
        {
            "policy": result.policy,
            "trace": trace_name(result),
            "predicted": each.predicted_s,
            "measured": each.taken_e2e_s,
        }
        for result in results
        for each in result.questions
        if each.taken_e2e_s and each.predicted_s
    ]
    rows = [rows[at] for at in _thinned(len(rows), 8 * MOST_POINTS)]
    ends = [value for row in rows for value in (row["predicted"], row["measured"])] or [0.1, 10]
    line = [{"x": min(ends)}, {"x": max(ends)}]
    log = {"type": "log", "nice": False}
    points = {
        "data": {"values": rows},
        "mark": {"type": "point", "filled": True, "size": 22, "opacity": 0.5},
        "encoding": {
            "x": _quantity("predicted", "predicted E2E, s", scale=log),
            "y": _quantity("measured", "measured E2E, s", scale=log),
            "color": _policy_colour(results),
            "tooltip": _tooltip("policy", "trace", ("predicted", ".2f"), ("measured", ".2f")),
        },
    }
    diagonal = {
        "data": {"values": line},
        "mark": {"type": "line", "strokeDash": [4, 4], "color": "#8a8a8a"},
        "encoding": {"x": _quantity("x", None, scale=log), "y": _quantity("x", None, scale=log)},
    }
    return _spec(layer=[points, diagonal], width=460, height=400)


def rungs(results: Sequence[Result]) -> Spec:
    """At which rungs caches went, by policy, and what that loses."""
    counted: dict[tuple[str, str], int] = {}
    losses: dict[str, float] = {}
    for result in results:
        for question in result.questions:
            for link in question.links:
                name = "tokens" if link.medium == "tokens" else link.rung
                losses[name] = link.kl
                counted[result.policy, name] = counted.get((result.policy, name), 0) + 1
    order = sorted(losses, key=lambda name: (losses[name], name == "tokens"))
    rows = [
        {"policy": policy, "rung": rung, "links": count, "loss": losses[rung], "at": order.index(rung)}
        for (policy, rung), count in counted.items()
    ]
    return _spec(
        data={"values": rows},
        mark={"type": "bar"},
        width=WIDE - 160,
        height=28 * len(_policies(results)),
        encoding={
            "y": {"field": "policy", "type": "nominal", "sort": list(_policies(results)), "title": None},
            "x": _quantity("links", "links", stack="normalize", axis={"format": "%"}),
            "color": {
                "field": "rung",
                "type": "ordinal",
                "sort": order,
                "title": "rung, least loss first",
                "scale": {"scheme": "viridis"},
            },
            "order": {"field": "at"},
            "tooltip": _tooltip("policy", "rung", ("links", "d"), ("loss", ".4f")),
        },
    )


def timeline(result: Result) -> Spec:
    """One run: links, questions with what travelled for them, memory, caches."""
    rates: Rows = []
    pressures: Rows = []
    kept: Rows = []
    for agent in result.agents:
        for at in _thinned(len(agent.time_s)):
            second = {"t": round(agent.time_s[at], 1), "agent": agent.agent}
            rates.append(second | {"Mbit/s": agent.link_mbps[at], "measured": agent.uplink_mbps[at]})
            pressures.append(second | {"pressure": agent.pressure[at]})
    for at_s, counts in _kept(result.agents):
        kept += [{"t": at_s, "kept": name, "caches": count} for name, count in zip(KEPT, counts, strict=True)]
    asked, mixed = [_asked(each) for each in result.questions], MEDIA | {"mixed": "#b15fd0"}
    seconds = _quantity("t", None, scale={"domain": [0, result.duration_s], "nice": False})
    by_agent = {"field": "agent", "type": "nominal", "title": "agent", "scale": {"scheme": "tableau10"}}
    link: Spec = {
        "data": {"values": rates},
        "width": WIDE,
        "height": TALL,
        "layer": [
            {
                "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 1.2},
                "encoding": {"x": seconds, "y": _rate("Mbit/s", "link, Mbit/s"), "color": by_agent},
            },
            {
                "mark": {"type": "line", "strokeDash": [2, 3], "strokeWidth": 1.2, "opacity": 0.9},
                "encoding": {"x": seconds, "y": _rate("measured", "link, Mbit/s"), "color": by_agent},
            },
        ],
    }
    questions: Spec = {
        "data": {"values": asked},
        "width": WIDE,
        "height": TALL,
        "layer": [
            {
                "mark": {"type": "rule", "opacity": 0.35},
                "encoding": {
                    "x": seconds,
                    "y": _quantity("e2e", "E2E, s"),
                    "y2": {"datum": 0},
                    "color": _named("medium", mixed) | {"legend": None},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {
                    "x": seconds,
                    "y": _quantity("e2e", "E2E, s"),
                    "color": _named("medium", mixed),
                    "shape": {
                        "field": "deadline",
                        "type": "nominal",
                        "title": "deadline",
                        "scale": {"domain": ["none", "met", "missed"], "range": ["circle", "triangle-up", "cross"]},
                    },
                    "tooltip": _tooltip(
                        "question", "receiver", "what", "rungs", ("e2e", ".2f"), ("predicted", ".2f"), ("MB", ".2f")
                    ),
                },
            },
            {
                "mark": {"type": "text", "dy": -9, "fontSize": 9, "color": "#8a8a8a"},
                "encoding": {"x": seconds, "y": _quantity("e2e", "E2E, s"), "text": {"field": "rungs"}},
            },
        ],
    }
    memory: Spec = {
        "data": {"values": pressures},
        "width": WIDE,
        "height": TALL * 0.6,
        "mark": {"type": "line", "strokeWidth": 1.2},
        "encoding": {
            "x": seconds,
            "y": _quantity("pressure", "memory pressure", scale={"domain": [0, 1]}),
            "color": by_agent,
        },
    }
    caches: Spec = {
        "data": {"values": kept},
        "width": WIDE,
        "height": TALL * 0.5,
        "mark": {"type": "area", "interpolate": "step-after", "opacity": 0.85},
        "encoding": {
            "x": _quantity("t", "seconds", scale={"domain": [0, result.duration_s], "nice": False}),
            "y": _quantity("caches", "contexts"),
            "color": _named("kept", KEPT),
            "order": {"field": "kept"},
        },
    }
    return _spec(vconcat=[link, questions, memory, caches], resolve={"scale": {"color": "independent"}})


def differences(rows: Sequence[Paired]) -> Spec:
    """Ratios of mean E2E of two replays, with their intervals."""
    values = [
        {"policy": row.name, "ratio": row.ratio[0], "low": row.ratio[1], "high": row.ratio[2], "n": row.questions}
        for row in rows
    ]
    y = {"field": "policy", "type": "nominal", "sort": None, "title": None}
    scale = {"zero": False}
    return _spec(
        data={"values": values},
        width=WIDE - 200,
        height=34 * max(1, len(values)),
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {
                    "y": y,
                    "x": _quantity("low", "mean E2E, second ÷ first", scale=scale),
                    "x2": {"field": "high"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
                "encoding": {
                    "y": y,
                    "x": _quantity("ratio", "mean E2E, second ÷ first", scale=scale),
                    "tooltip": _tooltip("policy", ("ratio", ".3f"), ("low", ".3f"), ("high", ".3f"), ("n", "d")),
                },
            },
            {
                "data": {"values": [{"one": 1}]},
                "mark": {"type": "rule", "strokeDash": [4, 4], "color": "#8a8a8a"},
                "encoding": {"x": _quantity("one", None, scale=scale)},
            },
        ],
    )


def _asked(question: QuestionResult) -> dict[str, Any]:
    media = list(dict.fromkeys(link.medium for link in question.links))
    deadline = "none" if question.deadline_s is None else "missed" if question.missed else "met"
    return {
        "t": question.at_s + question.waited_s,
        "question": f"{question.number}, {question.tokens} tokens",
        "receiver": question.receiver,
        "e2e": question.e2e_s if question.e2e_s is not None else 0.0,
        "predicted": question.predicted_s,
        "medium": media[0] if len(media) == 1 else "mixed",
        "what": ", ".join(f"{link.sender} {link.medium}" for link in question.links) or question.state,
        "rungs": ", ".join(dict.fromkeys(link.rung for link in question.links if link.medium != "tokens")),
        "deadline": deadline,
        "MB": question.sent_bytes / MEGABYTE,
    }


def _kept(agents: Sequence[AgentSeconds]) -> Iterable[tuple[float, tuple[int, ...]]]:
    """Over all agents, what is kept how, whenever the first of them reports."""
    if not agents:
        return
    times = agents[0].time_s
    for at in _thinned(len(times)):
        found = np.zeros(len(KEPT), dtype=int)
        for agent in agents:
            place = min(int(np.searchsorted(agent.time_s, times[at], side="right")), len(agent.time_s)) - 1
            found += np.array(agent.caches[max(0, place)])
        yield round(times[at], 1), tuple(found.tolist())


def _panels(rows: Rows, mark: Spec, encoding: Spec, *, height: float = PANEL * 0.7, own_x: bool = False) -> Spec:
    """A panel a trace."""
    spec = _spec(
        data={"values": rows},
        facet={
            "field": "trace",
            "type": "nominal",
            "title": None,
            "sort": list(dict.fromkeys(row["trace"] for row in rows)),
            "header": {"labelFontWeight": "bold"},
        },
        columns=COLUMNS,
        spec={"width": PANEL, "height": height, "mark": mark, "encoding": encoding},
    )
    if own_x:
        spec["resolve"] = {"scale": {"x": "independent"}}
    return spec


def _spec(**parts: Any) -> Spec:
    return {"$schema": SCHEMA, "background": None, **parts}


def _quantity(field: str, title: str | None, **more: Any) -> Spec:
    axis = {"grid": True, "title": title} | more.pop("axis", {})
    return {"field": field, "type": "quantitative", "axis": axis, **more}


def _rate(field: str, title: str) -> Spec:
    return _quantity(field, title, scale={"type": "symlog", "constant": 0.1})


def _named(field: str, colours: dict[str, str], title: str | None = None) -> Spec:
    scale = {"domain": list(colours), "range": list(colours.values())}
    return {"field": field, "type": "nominal", "title": title or field, "scale": scale}


def _policy_colour(results: Sequence[Result], *, legend: bool = True) -> Spec:
    names = _policies(results)
    others = iter(OTHERS * len(names))
    found = _named("policy", {name: POLICIES.get(name) or next(others) for name in names})
    return found if legend else found | {"legend": None}


def _tooltip(*fields: str | tuple[str, str]) -> list[Spec]:
    return [
        {"field": field} if isinstance(field, str) else {"field": field[0], "type": "quantitative", "format": field[1]}
        for field in fields
    ]


def _policies(results: Iterable[Result]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(result.policy for result in results))


def _by_trace(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(trace_name(result), []).append(result)
    return list(groups.items())


def _thinned(count: int, most: int = MOST_POINTS) -> list[int]:
    """Indices, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [int(at) for at in np.unique(np.linspace(0, count - 1, most).round().astype(int))]
