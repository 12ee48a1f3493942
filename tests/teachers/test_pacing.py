"""The pace of requests against servers with quotas, in simulated time."""

from __future__ import annotations

import asyncio
import random
import selectors
from types import SimpleNamespace

import pytest

from llmdistill.teachers import pacing

SLOW_DOWN = 1.0  # seconds that a server asks for, or 0


class Clock(selectors.SelectSelector):
    """Lets time jump to the next event of a loop."""

    now = 0.0

    def select(self, timeout=None):
        self.now += timeout or 0.0
        return []


def simulated(monkeypatch, server, *, requests, concurrency, seconds, pause=0.5):
    """Send requests that take so many seconds; return the time, the refusals and the failures."""
    clock = Clock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now
    monkeypatch.setattr(pacing, "time", SimpleNamespace(monotonic=lambda: clock.now))
    pace, refused, failed = pacing.Pace(concurrency), [], []

    async def one():
        failures, answered = 0, pace.answered
        while failures <= 6:
            started = await pace.start()
            await asyncio.sleep(seconds / 2)
            asked = server(clock.now)
            await asyncio.sleep(seconds / 2)
            pace.end()
            if asked is None:
                pace.hear()
                return
            refused.append(clock.now)
            pace.slow_down(started, asked, pause)
            failures, answered = failures + (pace.answered == answered), pace.answered
        failed.append(clock.now)

    async def run():
        await asyncio.gather(*(one() for _ in range(requests)))

    loop.run_until_complete(run())
    loop.close()
    return clock.now, len(refused), len(failed)


def spaced(rate, asked=SLOW_DOWN):
    """Takes a request only so long after the one before it."""
    free = [0.0]

    def takes(now):
        if now < free[0]:
            return asked
        free[0] = now + 1 / rate
        return None

    return takes


def bucket(rate, size, asked=SLOW_DOWN):
    """Takes `size` requests at once, and regains `rate` of them per second."""
    state = [0.0, float(size)]

    def takes(now):
        state[:] = now, min(size, state[1] + (now - state[0]) * rate)
        if state[1] < 1:
            return asked
        state[1] -= 1
        return None

    return takes


def window(number, seconds, says_when=True):
    """Takes so many requests in each window of time."""
    state = [0.0, 0]

    def takes(now):
        if now >= state[0]:
            state[:] = now + seconds, 0
        state[1] += 1
        if state[1] <= number:
            return None
        return state[0] - now if says_when else 0.0

    return takes


def unlucky(share, asked=SLOW_DOWN):
    """Refuses a share of all requests, however fast they come."""
    draw = random.Random(0)
    return lambda now: asked if draw.random() < share else None


# Server, requests, concurrency, seconds of a request, the least seconds, and times as long at most.
CASES = {
    "4 per second": (lambda: spaced(4), 400, 32, 0.003, 100, 1.4),
    "4 per second, short": (lambda: spaced(4), 64, 32, 0.003, 16, 1.8),
    "2 per second, not said": (lambda: spaced(2, 0.0), 200, 8, 0.003, 100, 1.4),
    "2 per second, slow replies": (lambda: spaced(2), 200, 8, 0.3, 100, 1.4),
    "20 per second, not said": (lambda: spaced(20, 0.0), 2000, 8, 0.003, 100, 2),
    "a bucket of 120": (lambda: bucket(2, 120), 600, 8, 0.3, 240, 1.1),
    "a bucket of 120, not said": (lambda: bucket(2, 120, 0.0), 600, 8, 0.3, 240, 1.1),
    "120 per minute": (lambda: window(120, 60), 600, 8, 0.3, 240, 1.2),
    "120 per minute, not said": (lambda: window(120, 60, False), 600, 8, 0.3, 240, 1.3),
    "one of 50": (lambda: unlucky(1 / 50), 600, 8, 0.3, 22, 3),
    "no limit": (lambda: unlucky(0.0), 600, 8, 0.3, 22, 1.1),
}


@pytest.mark.parametrize("case", CASES)
def test_most_of_a_quota_is_used_and_no_request_fails(monkeypatch, case):
    server, requests, concurrency, seconds, least, times = CASES[case]
    options = {"requests": requests, "concurrency": concurrency, "seconds": seconds}
    took, refused, failed = simulated(monkeypatch, server(), **options)
    assert failed == 0
    assert least * 0.9 <= took <= least * times
    assert refused < requests


def test_requests_that_were_under_way_count_once(monkeypatch):
    monkeypatch.setattr(pacing, "time", SimpleNamespace(monotonic=lambda: 5.0))
    pace = pacing.Pace(16)
    for _ in range(8):
        pace.slow_down(1.0, 0.0, 0.5)
    assert pace.limit == 8
    pace.slow_down(6.0, 0.0, 0.5)
    assert pace.limit == 4


def test_the_number_under_way_is_halved_and_added_to_again():
    pace = pacing.Pace(8)
    pace.slow_down(1.0, 0.0, 0.01)
    assert pace.limit == 4
    for _ in range(4):
        pace.hear()
    assert 4.8 < pace.limit < 5.1
    for _ in range(100):
        pace.hear()
    assert pace.limit == 8
