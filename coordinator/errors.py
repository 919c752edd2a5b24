"""The errors of the coordinator, one tree.

CoordinatorError
├── AgentUnknown           no agent of that name was ever heard of; names those that were
├── AgentOffline           the agent is known but not there; says since when
├── ContextNotHeld         the agent does not hold the context; names those it holds
├── ContextAmbiguous       the agent holds several contexts and the source names none of them
├── ModelsDiffer           sender and receiver run different models
├── PolicyUnknown          no policy of that name; names those there are
├── RequestImpossible      the request cannot be carried out as it stands; says why
├── RequestRefused         what a client is told of any of these (the coordinator's or an agent's line)
├── CoordinatorMissing     nobody coordinates the site
├── JournalUnwritable      what is promised could not be remembered
├── RecordingUnwritable    a session can't be recorded where it was to be
└── RecordingInvalid       a file is no recording of a session that can be read
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

LISTED = 8


def _listed(names: Iterable[str]) -> str:
    """Names for a line that a person reads: sorted, the first few, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


class CoordinatorError(Exception):
    """Root of all errors of this package. str() is one line, fit for a person."""


class AgentUnknown(CoordinatorError):
    """No agent of that name was ever heard of."""

    def __init__(self, agent: str, known: Iterable[str]) -> None:
        self.agent, self.known = agent, tuple(sorted(known))
        hint = f"known are {_listed(self.known)}" if self.known else "no agent has been heard of yet; start one"
        super().__init__(f"no agent is called {agent}: {hint}")


class AgentOffline(CoordinatorError):
    """The agent is known but not there. unseen_s is None if it was never heard itself (only its will was)."""

    def __init__(self, agent: str, unseen_s: float | None) -> None:
        self.agent, self.unseen_s = agent, unseen_s
        since = "never heard since this coordinator started" if unseen_s is None else f"last heard {unseen_s:.0f} s ago"
        super().__init__(f"{agent} is offline ({since}); start it or leave it out")


class ContextNotHeld(CoordinatorError):
    """The agent does not hold the context. name is None if it holds none at all and none was named."""

    def __init__(self, agent: str, name: str | None, held: Iterable[str]) -> None:
        self.agent, self.name, self.held = agent, name, tuple(sorted(held))
        what = "no context" if name is None else f"no context called {name}"
        hint = f"it holds {_listed(self.held)}" if self.held else "give it one first"
        super().__init__(f"{agent} holds {what}: {hint}")


class ContextAmbiguous(CoordinatorError):
    """The agent holds several contexts and the source names none of them."""

    def __init__(self, agent: str, held: Iterable[str]) -> None:
        self.agent, self.held = agent, tuple(sorted(held))
        super().__init__(
            f"{agent} holds {len(self.held)} contexts ({_listed(self.held)}); name one, such as {agent}:{self.held[0]}"
        )


class ModelsDiffer(CoordinatorError):
    """Sender and receiver run different models, whose caches do not fit each other."""

    def __init__(self, sender: str, sender_model: str, receiver: str, receiver_model: str) -> None:
        self.sender, self.sender_model = sender, sender_model
        self.receiver, self.receiver_model = receiver, receiver_model
        super().__init__(
            f"{sender} ({sender_model}) and {receiver} ({receiver_model}) run different models; "
            "alignment is not built yet: ask between agents that run the same one"
        )


class PolicyUnknown(CoordinatorError):
    """No policy of that name."""

    def __init__(self, policy: str, known: Iterable[str]) -> None:
        self.policy, self.known = policy, tuple(sorted(known))
        super().__init__(f"no policy is called {policy}: choose one of {_listed(self.known)}")


class RequestImpossible(CoordinatorError):
    """The request cannot be carried out as it stands. reason says why, and what to change."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"this request is not possible: {reason}")


class RequestRefused(CoordinatorError):
    """What a client is told when its request was not taken: the line of whoever refused it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class CoordinatorMissing(CoordinatorError):
    """Nobody coordinates the site."""

    def __init__(self, site: str) -> None:
        self.site = site
        super().__init__(f"no coordinator is running for site {site}; start one with `coordinator run`")


class JournalUnwritable(CoordinatorError):
    """The journal can't be written, so nothing may be promised."""


class RecordingUnwritable(CoordinatorError):
    """A session can't be recorded there."""

    def __init__(self, path: Path, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(f"recording {path} can't be written: {why}")


class RecordingInvalid(CoordinatorError):
    """The file is no recording of a session that can be read."""

    def __init__(self, path: Path, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(f"{path} can't be read as a recorded session: {why}")
