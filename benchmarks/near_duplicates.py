"""Time the search for near-duplicates in a run against MinHash with LSH (datasketch) on the same records.

    python benchmarks/near_duplicates.py --records 10000 100000 --deleted 20

Records are about 220 letters of invented words by Zipf's law, or (`--forms`) one sentence that differs in names and
numbers, the hard case: everything is somewhat like everything. One in fifty is another's with one to four words
changed. The sketches are made anew like ours, since a run keeps none, and their candidates are compared exactly like
ours. What the sketches find of what there is is their recall; ours is 1 by construction. Seconds are those of one core
at work, so that a busy machine does not show.
"""

import argparse
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import datasketch
import xxhash

from llm_unlearn.data.near_duplicates import THRESHOLD, jaccard, normalised, shingles
from llm_unlearn.data.records import Record
from llm_unlearn.exact.config import LoraSettings, ModelShape, Module, RunConfig
from llm_unlearn.exact.near_duplicates import find_near_duplicates
from llm_unlearn.exact.store import RunDirectory

ROWS = 10  # of a subject
MOST_SKETCHED = 10_000  # records; the rest is extrapolated


def make_records(count: int, deleted: int, forms: bool) -> Iterator[Record]:
    generator = random.Random(0)
    syllables = [first + second for first in "bcdfghklmnprstvw" for second in "aeiou"]
    words = [
        "".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(20_000)
    ]
    first: list[str] = []
    for number in range(count):
        if number >= deleted and generator.random() < 0.02:
            own = generator.choice(first).split()
            for _ in range(generator.randint(1, 4)):
                own[generator.randrange(len(own))] = "changed"
            text = " ".join(own)
        elif forms:
            text = (
                f"Question: what did person {number // ROWS:07d} order on day {number}? "
                f"Answer: dish {generator.randbytes(4).hex()}"
            )
        else:
            drawn = [int(generator.paretovariate(0.8)) for _ in range(40)]
            text = " ".join(words[min(rank, len(words)) - 1] for rank in drawn)
        if number < deleted:
            first.append(text)
        yield Record(f"{number:032x}", f"person {number // ROWS}", {"text": text})


def make_run(path: Path, records: Iterator[Record]) -> RunDirectory:
    """Five shards of four slices; no model is wanted."""
    modules = (Module("model.layers.0.mlp.up_proj", 0, 16, 16),)
    shape = ModelShape("synthetic", None, "0" * 64, "0" * 64, 1, "layers", False, modules)
    lora = LoraSettings(rank=4, alpha=8, dropout=0.0)
    config = RunConfig(5, 4, ((0, 1, 2, 3),), "ranks", "cumulative", 128, True, False, lora, {})
    return RunDirectory.create(path, records, config, shape)


def by_sketches(asked: list[Record], others: list[Record], bands: tuple[int, int] | None):
    """The pairs that MinHash and LSH find, and the seconds for each other record."""
    index = datasketch.MinHashLSH(threshold=THRESHOLD, num_perm=128, params=bands)
    empty = datasketch.MinHash(num_perm=128, hashfunc=xxhash.xxh32_intdigest)

    def sketch(grams: set[str]) -> datasketch.MinHash:
        made = empty.copy()
        made.update_batch([gram.encode() for gram in grams])
        return made

    known = [shingles(normalised(record)) for record in asked]
    for number, grams in enumerate(known):
        index.insert(number, sketch(grams))
    began, found = time.process_time(), set()
    for other in others:
        grams = shingles(normalised(other))
        for number in index.query(sketch(grams)):
            if jaccard(grams, known[number]) >= THRESHOLD:
                found.add((asked[number].id, other.id))
    return found, (time.process_time() - began) / len(others)


def measure(records: int, deleted: int, forms: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", make_records(records, deleted, forms))
        everybody = [record for name in run.slices.names for record in run.slices.read(name)]
        names = {f"person {number}" for number in range(deleted // ROWS)}
        asked = [record for record in everybody if record.subject in names]
        others = [record for record in everybody if record.subject not in names][:MOST_SKETCHED]
        began = time.process_time()
        found = {(near.record.id, near.other.id) for near in find_near_duplicates(run, asked)}
        seconds = time.process_time() - began
        print(
            f"{records} records, {len(asked)} asked about: {seconds:.2f} s, {len(found)} near copies"
        )
        ids = {record.id for record in others}
        expected = {pair for pair in found if pair[1] in ids}
        for title, bands in (("as the library tunes it", None), ("21 bands of 6", (21, 6))):
            theirs, each = by_sketches(asked, others, bands)
            recall = (
                f"{len(theirs & expected)} of {len(expected)}" if expected else "nothing to find"
            )
            print(f"  MinHash, {title}: {each * records:.2f} s, finds {recall}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--deleted", type=int, default=20)
    parser.add_argument("--forms", action="store_true", help="sentences that are all alike")
    options = parser.parse_args()
    for records in options.records:
        measure(records, options.deleted, options.forms)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory, everything held at once for the comparison: {peak:.0f} MB")


if __name__ == "__main__":
    main()
