"""What the ledger costs with a million entries, and under eight processes at once.

    python benchmarks/ledger.py [--entries 1000000] [--requests 10000] [--ledger_url postgresql://...]

Requests one by one are the baseline of requests in one transaction; reading every entry is that of the
look-ups.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from llm_unlearn.console import print_table
from llm_unlearn.exact.ledger import Ledger, Request, Target
from llm_unlearn.exact.postgresql import Address

PROCESSES = 8


def new_ledger(folder: Path, url: str | None) -> Ledger:
    folder.mkdir()
    if url:
        Address.new(url).write(folder)
    made = Ledger.of(folder)
    made.create()
    made.append("created", {})
    return made


def request(number: int) -> Request:
    nodes = tuple(f"{node:064x}" for node in range(20))
    target = Target("subject", f"{number:064x}", shard=0, slice=0, records=3)
    return Request(f"{number:016x}", (target,), nodes, "d" * 64, idempotency=f"{number:064x}")


def seconds(work: Callable[[], object], times: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def ask(folder: Path, numbers: range) -> None:
    held = Ledger.of(folder)
    for number in numbers:
        held.acknowledge(request(number))
        held.finish({f"{number:016x}": {"certificate": "c" * 64}})


def ask_together(folder: Path, count: int) -> None:
    works = [
        multiprocessing.Process(target=ask, args=(folder, range(start, count, PROCESSES)))
        for start in range(PROCESSES)
    ]
    for work in works:
        work.start()
    for work in works:
        work.join()
    held = Ledger.of(folder)
    assert len(held.requests()) == count and held.check_chain() == []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--ledger_url")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ledger-") as root:
        measure(Path(root), options)


def measure(root: Path, options: argparse.Namespace) -> None:
    held = new_ledger(root / "large", options.ledger_url)
    node = {"weights": "w" * 64, "manifest": "m" * 64, "seconds": 0.1}
    for start in range(0, options.entries, 50_000):
        rest = range(start, min(start + 50_000, options.entries))
        held.append("trained", *({"node": f"{number:064x}", **node} for number in rest))
    asked = [request(number) for number in range(options.requests)]
    finished = {each.id: {"certificate": "c" * 64} for each in asked[:-10]}
    more = iter(range(options.requests, options.requests + 100))
    alone = seconds(lambda: held.acknowledge(request(next(more))), 100)
    rows = [
        (f"{options.requests} requests in one transaction", seconds(lambda: held.acknowledge(*asked))),
        ("as many, one by one (measured on 100)", options.requests * alone),
        ("carrying all but ten out, in one transaction", seconds(lambda: held.finish(finished))),
        ("what is pending", seconds(lambda: held.requests(pending=True), 20)),
        ("is a subject deleted?", seconds(lambda: held.deleted([f"{5:064x}"]), 20)),
        ("all entries read", seconds(held.events)),
        ("all cells checked", seconds(held.check_chain)),
    ]  # fmt: skip
    small = new_ledger(root / "small", options.ledger_url)
    small.database.engine.dispose()
    rows.append(
        ("1000 requests through 8 processes", seconds(lambda: ask_together(root / "small", 1000)))
    )
    for made in (held, small):
        if options.ledger_url:
            made.database.drop()
    title = f"{options.entries} entries, {options.requests} requests"
    print_table(title, ("what", "s"), [(name, f"{value:.4f}") for name, value in rows])


if __name__ == "__main__":
    main()
