"""How many requests may be inside, and the orderly end. Whom the model works for, the engine's scheduler says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from audioflamingo.engine.request import Share
from audioflamingo.server.error_replies import busy, shutting_down, timed_out


class Gate:
    """Counts requests in and out.

    Args:
        max_inside: requests that may be inside: uploading, being prepared, waiting for the model, or answered.

    Attributes:
        closing: set once the server shuts down.
    """

    def __init__(self, max_inside: int) -> None:
        self._max_inside = max_inside
        self._places: set[Place] = set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self.closing = asyncio.Event()

    @property
    def is_closing(self) -> bool:
        """Whether the server shuts down."""
        return self.closing.is_set()

    @property
    def num_inside(self) -> int:
        """All requests."""
        return len(self._places)

    @property
    def num_running(self) -> int:
        """Requests that the model has begun to work for."""
        return sum(place.is_running for place in list(self._places))

    @property
    def num_waiting(self) -> int:
        """The others."""
        return self.num_inside - self.num_running

    @property
    def num_sessions(self) -> int:
        """Live sessions."""
        return sum(place.is_session for place in list(self._places))

    @contextmanager
    def enter(self, is_session: bool = False) -> Iterator[Place]:
        """Takes a place until the end of the block.

        Args:
            is_session: whether it goes on until the client ends it; then it ends itself once `closing` is set.

        Raises:
            ApiError: 429 if all are taken, 503 if the server is shutting down.
        """
        if self.is_closing:
            raise shutting_down()
        if self.num_inside >= self._max_inside:
            raise busy(self.num_waiting)
        place = Place(self, is_session)
        self._places.add(place)
        self._is_empty.clear()
        try:
            yield place
        finally:
            self._places.remove(place)
            place.left.set()
            if not self._places:
                self._is_empty.set()

    def close(self) -> None:
        """Lets nobody in any more; whom the model has not begun with is turned away."""
        self.closing.set()
        for place in self._places:
            if not (place.is_running or place.is_session):
                place.turn_away()

    async def wait_for_sessions(self) -> None:
        """Waits until the last live session has left."""
        for place in [place for place in self._places if place.is_session]:
            await place.left.wait()

    async def wait_until_empty(self) -> None:
        """Waits until the last request has left."""
        await self._is_empty.wait()


class Place:
    """A request inside the gate.

    Attributes:
        share: what it has had of the model.
        is_session: see `Gate.enter`.
        left: set once it is given back.
    """

    def __init__(self, gate: Gate, is_session: bool) -> None:
        self._gate = gate
        self.is_session = is_session
        self.left = asyncio.Event()
        self._limit: asyncio.Timeout | None = None
        self._is_turned_away = False
        self.share = Share()

    @property
    def is_running(self) -> bool:
        """Whether the model has begun to work for it."""
        return self.share.service_s > 0

    @asynccontextmanager
    async def time_limit(self, seconds: float) -> AsyncIterator[None]:
        """Ends the block after so many seconds, or when the request is turned away.

        Raises:
            ApiError: 504 or 503.
        """
        if self._gate.is_closing:
            raise shutting_down()
        try:
            async with asyncio.timeout(seconds) as self._limit:
                yield
        except TimeoutError:
            assert self._limit is not None
            if not self._limit.expired():
                raise
            raise (shutting_down() if self._is_turned_away else timed_out(seconds)) from None
        finally:
            self._limit = None

    def turn_away(self) -> None:
        """Ends what `time_limit` holds at once."""
        if self._limit is not None and not self._limit.expired():
            self._is_turned_away = True
            self._limit.reschedule(asyncio.get_running_loop().time())
