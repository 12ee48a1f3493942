"""How tasks are made.  A generator is asked for call after call; each call is a short exchange with
the teacher that ends with tasks.

Everything random is drawn from the seed and the number of the call, so a call that is made again
asks the same.
"""

from __future__ import annotations

from llmdistill.instruct.generators.base import Answering, Cost, TaskGenerator
from llmdistill.instruct.generators.given import Answer, Rewrite
from llmdistill.instruct.generators.lists import Alpaca, SelfInstruct
from llmdistill.instruct.generators.variants import Evolve, Lion, Magpie

__all__ = [
    "Alpaca",
    "Answer",
    "Answering",
    "Cost",
    "Evolve",
    "Lion",
    "Magpie",
    "Rewrite",
    "SelfInstruct",
    "TaskGenerator",
]
