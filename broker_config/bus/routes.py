"""Which handler gets which message. Shared by every bus; knows topics and bytes, not MQTT."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from broker_config.bus.contract import Handler
from broker_config.errors import MessageRejected
from broker_config.topics import Topic
from broker_config.wire import unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Route:
    """One subscription: a topic with some of its parameters fixed, and a handler."""

    topic: Topic[Any]
    fixed: Mapping[str, str]
    handler: Handler[Any]

    @property
    def filter(self) -> str:
        """The MQTT topic filter."""
        return self.topic.filter(**self.fixed)

    def match(self, address: str) -> dict[str, str] | None:
        """The topic's parameters without site, or None if the address is not for this route."""
        found = self.topic.parse(address)
        if found is None or any(found[name] != value for name, value in self.fixed.items()):
            return None
        found.pop("site", None)
        return found


class Routes:
    """The routes of one bus."""

    def __init__(self) -> None:
        self._routes: list[Route] = []

    def __iter__(self) -> Iterator[Route]:
        return iter(tuple(self._routes))

    def add(self, route: Route) -> None:
        """From now on the route's handler is called."""
        self._routes.append(route)

    def remove(self, route: Route) -> bool:
        """Stop calling a route's handler. True if it was there and no other route has the same filter."""
        if route not in self._routes:
            return False
        self._routes.remove(route)
        return all(other.filter != route.filter for other in self._routes)

    def filters(self) -> dict[str, int]:
        """Every filter to subscribe to, with the highest QoS among its topics."""
        wanted: dict[str, int] = {}
        for route in self._routes:
            wanted[route.filter] = max(route.topic.qos, wanted.get(route.filter, 0))
        return wanted

    def dispatch(self, address: str, payload: bytes) -> None:
        """Call the handlers of everyone who listens. Bad messages and failing handlers are logged, never raised."""
        unpacked: dict[str, Any] = {}
        for route in self:
            parameters = route.match(address)
            if parameters is None:
                continue
            pattern = route.topic.pattern
            if pattern not in unpacked:
                try:
                    unpacked[pattern] = unpack(route.topic, payload)
                except MessageRejected as rejected:
                    logger.warning("dropped a message from %s: %s", address, rejected)
                    return
            self._call(route, unpacked[pattern], parameters)

    @staticmethod
    def _call(route: Route, message: object, parameters: Mapping[str, str]) -> None:
        try:
            route.handler(message, parameters)
        except Exception:  # a handler's mistake must not end the session that serves all the others
            logger.exception("a handler of %s failed", route.topic.pattern)
