"""Every exact method in every kind of block, and how it can be served: the table that the tests go through."""

from typing import Any

from tests.tiny import core_records, placed_by_id

LEGO = {
    "exact_method": "lego", "num_shards": 7, "num_slices": 1, "num_sequences": 1, "copies": 2, "aggregate": "nearest",
}  # fmt: skip
OWN = {"exact_method": "experts", "num_shards": 0, "num_slices": 1, "num_sequences": 1}

METHODS: dict[str, dict[str, Any]] = {
    "s3t, ranks": {"num_shards": 2, "num_slices": 2, "num_sequences": 2},
    "s3t, layers": {"num_shards": 2, "num_slices": 2, "num_sequences": 2, "blocks": "layers"},
    "s3t, disjoint": {"num_slices": 3, "num_sequences": 2, "slice_data": "disjoint"},
    "sisa": {"num_shards": 2, "num_slices": 2, "num_sequences": 1, "blocks": "whole"},
    "experts": {"exact_method": "experts", "num_shards": 3, "num_slices": 1, "num_sequences": 1},
    "experts by subject": OWN,
    "experts on a core": {**OWN, "num_shards": 2, "core": core_records()},
    "lego": {**LEGO, "placement": placed_by_id(7, 2)},
}


def aggregations(method: str) -> list[str]:
    """The ways in which a method can be served."""
    everybody = ["average", "vote", "merge"]
    return [*everybody, "nearest"] if method == "lego" else [*everybody, "select", "mixture"]
