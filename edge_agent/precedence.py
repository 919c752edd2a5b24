"""Which part of a question computes first: all that was planned, in the order of the parts, then what goes beyond."""

from __future__ import annotations

import asyncio


class Precedence:
    """Of the parts of one question."""

    def __init__(self) -> None:
        self._seats: list[Seat] = []

    def seat(self) -> Seat:
        """The place of the next part."""
        self._seats.append(Seat(self, len(self._seats)))
        return self._seats[-1]

    def may(self, seat: Seat) -> bool:
        """Whether this part may compute now, beside what the others wish to."""
        planned = [other.place for other in self._seats if other.wishes_planned and other is not seat]
        if seat.wishes_planned:
            return all(seat.place < place for place in planned)
        return not planned

    def changed(self) -> None:
        """Somebody's wish is another: all look again."""
        for seat in self._seats:
            seat.news.set()


class Seat:
    """One part's place. `news` is set when something may have changed for it."""

    def __init__(self, precedence: Precedence, place: int) -> None:
        self._precedence, self.place = precedence, place
        self.wishes_planned = False
        self.news = asyncio.Event()

    @property
    def alone(self) -> bool:
        """Whether the question has no other part."""
        return len(self._precedence._seats) == 1

    def wish(self, *, planned: bool) -> None:
        """Whether this part has planned tokens that it would compute at once."""
        if planned != self.wishes_planned:
            self.wishes_planned = planned
            self._precedence.changed()

    def may_compute(self) -> bool:
        return self._precedence.may(self)
