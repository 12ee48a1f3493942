"""Time and memory to compare a new row with 52,000 kept ones.

    python scripts/bench_rouge.py [--pool 52000] [--write PATH]

The first table compares the filter `rouge` with calling `rouge_score` on every pair, which is timed
on a sample of the pool and scaled up.  Texts consist of random words of the seed tasks and are as
long as their instructions.  The second table counts on how many of 2,000 pairs, whose ROUGE-L is
within 0.1 of 0.7, both make the same decision.  The third table is for the filter
`near_duplicates` with as many rows: the time of a query and of adding a row, which both make a
sketch, and the memory of this process that the rows take.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import benchmark
from rouge_score.rouge_scorer import RougeScorer

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmdistill.data.sources import read
from llmdistill.instruct.filters import NearDuplicates
from llmdistill.instruct.similarity import RougePool
from llmdistill.instruct.tasks import Task

AT_MOST, PAIRS, QUERIES, SAMPLE = 0.7, 2000, 100, 2000


def seeds() -> list[list[str]]:
    return [row["instruction"].split() for _, row in read("seed_tasks")]


def drawn(number: int, seed: int) -> list[str]:
    """Return random texts of the seeds' words, as long as the seeds' instructions."""
    draw, known = random.Random(seed), seeds()
    words = [word for text in known for word in text]
    return [" ".join(draw.choices(words, k=len(draw.choice(known)))) for _ in range(number)]


def timed(pool_size: int) -> list[dict[str, object]]:
    pool, queries, index = drawn(pool_size, 0), drawn(QUERIES, 1), RougePool()
    start = time.perf_counter()
    for text in pool:
        index.add(text)
    adding = time.perf_counter() - start
    start = time.perf_counter()
    for text in queries:
        index.nearest(text, AT_MOST)
    ours = (time.perf_counter() - start) / QUERIES
    scorer = RougeScorer(["rougeL"])
    start = time.perf_counter()
    for text in pool[:SAMPLE]:
        scorer.score(text, queries[0])
    theirs = (time.perf_counter() - start) / SAMPLE * pool_size
    return [
        {"compared": f"filter `rouge`, mean of {QUERIES} texts", "ms per text": ours * 1e3},
        {
            "compared": f"`rouge_score` on every pair ({SAMPLE} of them timed)",
            "ms per text": theirs * 1e3,
        },
        {"compared": "times faster", "ms per text": f"{theirs / ours:.0f}"},
        {
            "compared": "(adding one text to the pool)",
            "ms per text": f"{adding / pool_size * 1e3:.3f}",
        },
    ]


def decided() -> dict[str, object]:
    """Count equal decisions on pairs near the threshold: a text and itself with words replaced."""
    draw, known, scorer = random.Random(2), seeds(), RougeScorer(["rougeL"])
    words = [word for text in known for word in text]
    same = above = 0
    # Pairs far from the threshold would agree even if the filter were only roughly right.
    for _ in range(PAIRS):
        while True:
            text = draw.choice(known)
            share = draw.uniform(0.1, 0.6)
            other = [draw.choice(words) if draw.random() < share else word for word in text]
            score = scorer.score(" ".join(other), " ".join(text))["rougeL"].fmeasure
            if abs(score - AT_MOST) <= 0.1:
                break
        index = RougePool()
        index.add(" ".join(other))
        same += (index.nearest(" ".join(text), AT_MOST) is not None) == (score > AT_MOST)
        above += score > AT_MOST
    return {"pairs": PAIRS, "above 0.7": above, "same decision": same}


def near_duplicates(pool_size: int) -> dict[str, object]:
    """Measure the filter `near_duplicates` with a pool of rows."""
    filter, queries = NearDuplicates(), [Task(text) for text in drawn(QUERIES, 1)]
    filter.kept(queries[0])  # imports what it needs
    before = memory_mib()
    pool = drawn(pool_size, 0)
    texts = memory_mib() - before
    start = time.perf_counter()
    for text in pool:
        filter.kept(Task(text))
    adding = (time.perf_counter() - start) / pool_size
    taken = memory_mib() - before - texts
    start = time.perf_counter()
    for query in queries:
        filter.reason(query)
    asking = (time.perf_counter() - start) / QUERIES
    return {
        "rows": pool_size,
        "query (ms)": asking * 1e3,
        "adding (ms)": adding * 1e3,
        "MiB": taken,
    }


def memory_mib() -> float:
    """Return the memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=int, default=52_000, help="number of texts in the pool")
    parser.add_argument("--write", metavar="PATH", help="also write the page to this Markdown file")
    options = parser.parse_args()
    about = __doc__.split("\n\n", 2)[2]
    tables = [timed(options.pool), [decided()], [near_duplicates(options.pool)]]
    parts = [about, *map(benchmark.table, tables)]
    benchmark.report(options.write, f"A new row against {options.pool:,}", parts)


if __name__ == "__main__":
    main()
