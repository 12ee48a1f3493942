"""When a request to a server may start: how many at a time, how often, and after which pauses."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

LONGEST_PAUSE = 30.0  # seconds between two attempts
LONGEST_WAIT = 300.0  # seconds between two attempts if the server asks for a pause (Retry-After)
HOLD = 2  # pauses that hold all requests if the server does not say how long
# Changes of the interval between two starts: after "too many requests"; after an answer; and after
# an answer if it is about as short as the one that was too short.
SLOWER, FASTER, CAREFUL = 1.2, 0.9, 0.998
FORGET, LONGEST = 0.9, 1.5  # of the best rate, after each refusal; and intervals at that rate
MARGIN = 1.05  # how much longer than the one that was too short an interval is tried again
FAR_TOO_FAST = 3  # requests sent for each answer


class Pace:
    """Decides when the next request starts.

    At most `concurrency` requests run at a time, and at most `per_minute` start in a minute.  If
    the server says that these are too many, all requests wait, and then fewer run at a time: half
    as many at once, one more after each round of answers (additive increase, multiplicative
    decrease, Chiu and Jain 1989).  The interval between two starts is adapted as well, because even
    single requests can be too fast: it grows, shrinks quickly back to the one that was too short,
    and then slowly (as the window of TCP Cubic does, Ha et al. 2008).
    """

    def __init__(self, concurrency: int, per_minute: float | None = None) -> None:
        self.concurrency, self.limit = concurrency, float(concurrency)
        self.shortest = self.interval = 60.0 / per_minute if per_minute else 0.0
        self.answered = 0  # replies so far
        self._next = self._held_until = self._slowed_at = 0.0
        self._too_short = self._best = 0.0  # an interval in seconds, answers per second
        self._starts: list[float] = []  # first and last start since the server slowed us down
        self._started = self._answered_since = self._holds = 0
        self.open()

    def open(self) -> None:
        """Make ready for requests of a new event loop."""
        self._running, self._queue, self._freed = 0, asyncio.Lock(), asyncio.Event()

    async def start(self) -> float:
        """Wait until a request may start, and return the time."""
        async with self._queue:  # one at a time, in order
            while True:
                now = time.monotonic()
                if (wait := max(self._held_until, self._next) - now) > 0:
                    await asyncio.sleep(wait)  # the server may ask for more in the meantime
                elif self._running >= max(int(self.limit), 1):
                    self._freed.clear()
                    await self._freed.wait()
                else:
                    break
            self._running += 1
            self._next = now + self.interval
            self._starts = [*self._starts[:1], now]
            self._started += 1
            return now

    def end(self) -> None:
        """A request has ended, in whatever way."""
        self._running -= 1
        self._freed.set()

    def hear(self) -> None:
        """A reply came: go a little faster."""
        self.answered += 1
        self._answered_since += 1
        self._holds = 0
        self.limit = min(self.limit + 1 / self.limit, self.concurrency)
        known = self._too_short * MARGIN
        shorter = max(self.interval * FASTER, known) if self.interval > known else self.interval
        self.interval = max(shorter * CAREFUL, self.shortest)

    def hold(self, seconds: float) -> None:
        """Let no request start for so long."""
        self._held_until = max(self._held_until, time.monotonic() + seconds)

    def obey(self, started: float, asked: float, pause: float, *, is_too_many: bool) -> None:
        """Wait as the server asks for, and slow down if there were too many requests."""
        if is_too_many:
            self.slow_down(started, asked, pause)
        else:
            self.hold(asked)

    def slow_down(self, started: float, asked: float, pause: float) -> None:
        """The server says that there are too many requests.

        `started` is when the refused request started, `asked` the pause that the server asks for
        (0 if it does not say), and `pause` the shortest one otherwise, in seconds.
        """
        # Requests that were under way together are refused together: they count once.
        is_new = started >= self._slowed_at
        wait = asked or min(HOLD * pause * 2**self._holds, LONGEST_PAUSE)
        if asked or is_new:
            self.hold(wait)
        if not is_new:
            return
        now = time.monotonic()
        self.limit = max(self.limit / 2, 1.0)
        self._holds += 1
        if self._answered_since:  # otherwise nothing is known about the right rate
            first, last = self._starts[0], self._starts[-1]
            sent = max(self.interval or (last - first) / max(self._started - 1, 1), 1e-3)
            answered = max(now - (self._slowed_at or first), 1e-3) / self._answered_since
            # Between the rate that was far too fast and the one that got through, or a bit slower.
            is_far = answered > FAR_TOO_FAST * sent
            slower = math.sqrt(sent * answered) if is_far else sent * SLOWER
            # Refusals may have other reasons: far more has got through before, so it will again.
            got = self._answered_since / max(now - (self._slowed_at or first), 1.0)
            self._best = max(self._best * FORGET, got)
            # After the pause that the server asks for, it takes a request for sure.
            longest = min(asked or HOLD * pause, LONGEST / self._best)
            self.interval = max(min(slower, longest), self.shortest)
            self._too_short = sent
        self._slowed_at, self._starts = now, []
        self._started = self._answered_since = 0


def asked_to_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds of a Retry-After header (a number or a date), or 0."""
    if milliseconds := _number(headers.get("retry-after-ms")):
        seconds = milliseconds / 1000
    else:
        asked = headers.get("retry-after")
        seconds = _number(asked) or _until(asked)
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _number(text: str | None) -> float:
    try:
        number = float(text or 0)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


def _until(date: str | None) -> float:
    """Return the seconds until a date, or 0 for a text that is no date."""
    try:
        return parsedate_to_datetime(date or "").timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
