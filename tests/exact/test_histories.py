"""Random histories of deletions and rebuilds, against runs that never saw the deleted records.

Training is replaced by a digest of everything that it is given (`stub_train_node`), so hundreds of
histories fit in seconds; that real training is a function of those inputs is shown in
`test_exactness.py`.
"""

import math
import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import (
    core_records,
    make_stub_run,
    node_bytes,
    served_bytes,
    stubbed_training,
    tiny_records,
    train_stub,
)

SUBJECTS = [f"person {number}" for number in range(12)]


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, object]:
    slices = draw(st.integers(1, 4))
    if draw(st.integers(0, 3)) == 0:
        subject_experts = {"exact_method": "experts", "num_shards": 0}
        return {**subject_experts, "num_slices": 1, "num_sequences": 1}
    blocks = draw(st.sampled_from(["ranks", "layers", "whole"]))
    orders = min(math.factorial(slices), slices + 2) if blocks != "whole" else 1
    return {
        "num_shards": draw(st.integers(1, 3)),
        "num_slices": slices,
        "num_sequences": draw(st.integers(1, orders)),
        "blocks": blocks,
        "slice_data": draw(st.sampled_from(["cumulative", "disjoint"])),
        "core": draw(st.sampled_from([[], core_records()])),
    }


steps = st.lists(
    st.one_of(
        st.lists(st.sampled_from(SUBJECTS), min_size=1, max_size=3, unique=True), st.just("rebuild")
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), history=steps)
def test_any_history_leaves_what_a_run_without_the_records_would_hold(shape, history) -> None:
    root = Path(tempfile.mkdtemp(prefix="llm-unlearn-test-"))
    try:
        with stubbed_training():
            run = make_stub_run(root / "run", tiny_records(), **shape)
            train_stub(run)
            gone: set[str] = set()
            for step in history:
                if step == "rebuild":
                    train_stub(run)
                else:
                    run.delete(step)
                    gone |= set(step)
                assert all(check.passed for check in run.verify())
            never = make_stub_run(
                root / "never",
                [record for record in tiny_records() if record.subject not in gone],
                **shape,
            )
            train_stub(never)
            fresh = node_bytes(never)
            assert node_bytes(run).items() <= fresh.items()
            train_stub(run)
            assert node_bytes(run) == fresh
            assert served_bytes(run) == served_bytes(never)
            records = [
                path.read_bytes() for path in sorted((run.path / "records").rglob("*.jsonl"))
            ]
            assert records == [
                path.read_bytes() for path in sorted((never.path / "records").rglob("*.jsonl"))
            ]
    finally:
        shutil.rmtree(root)


def test_the_order_of_the_records_does_not_matter(tmp_path: Path) -> None:
    with stubbed_training():
        runs = [make_stub_run(tmp_path / name, rows) for name, rows in _orders().items()]
        for run in runs:
            train_stub(run)
    assert node_bytes(runs[0]) == node_bytes(runs[1])


def _orders() -> dict[str, list]:
    return {"forward": tiny_records(), "backward": tiny_records()[::-1]}


def test_sequences_share_the_nodes_of_equal_prefixes(tmp_path: Path) -> None:
    with stubbed_training():
        run = make_stub_run(tmp_path / "run", tiny_records(), num_sequences=6)
        train_stub(run)
    wanted = run.directory.wanted()
    assert len(wanted) == 3 + 6 + 6  # all permutations of 3: 3 first slices, 6 pairs, 6 triples
    assert len(run.directory.nodes.keys()) == len(wanted)


def test_deletion_serves_the_longest_prefix_of_any_sequence(tmp_path: Path) -> None:
    """The worked example of the S3T paper: of 1234 and 4123, losing 3 leaves 12 and 412."""
    with stubbed_training():
        run = make_stub_run(tmp_path / "run", tiny_records(), num_slices=4, num_sequences=2)
        train_stub(run)
    third = next(s for s in SUBJECTS if run.directory.slices.place(s).slice == 2)
    done = run.delete([third])
    assert done.served == {0: 3}
    assert done.nodes_removed == 3
    first = next(s for s in SUBJECTS if run.directory.slices.place(s).slice == 3)
    assert run.delete([first]).served == {0: 2}
