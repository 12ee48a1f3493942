"""S4: a chat template can neither reach out of its sandbox nor keep a run busy."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from llmdistill.errors import DataError
from llmdistill.models import chat, limits
from llmdistill.models.chat import ChatTemplate
from tests import toy

ASKED = [{"role": "user", "content": "why"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def render(template):
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, place="x:1").text(ASKED, opens=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_an_attack_is_an_error_of_the_row(template):
    with pytest.raises(DataError, match="x:1: the chat template rejects this conversation"):
        render(template)


def test_an_endless_template_is_stopped(monkeypatch):
    monkeypatch.setattr(chat, "RENDERING", 0.3)
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"TimeoutError: it takes more than 0.3 seconds"):
        render(ENDLESS)
    assert time.perf_counter() - start < 5


def test_an_alarm_of_someone_else_goes_on(monkeypatch):
    heard = []
    before = signal.getsignal(signal.SIGALRM)
    old = signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        with limits.time_limit(5):
            pass
        time.sleep(0.4)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *old)
    assert heard == [1]


def test_without_a_main_thread_there_is_no_limit():
    found = []

    def work():
        with limits.time_limit(0.01):
            time.sleep(0.05)
        found.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1]
