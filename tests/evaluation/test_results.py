"""results.json: what is written is what is read, nothing personal by default, damage is told."""

import json
import math
import stat
from pathlib import Path

import numpy as np
import pytest
from fake_results import SECRET, all_nan, fake_muse, fake_tofu

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.results import Results, Value, read_results


def same(left: object, right: object) -> bool:
    """Equal at any depth, NaN like NaN."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


@pytest.mark.parametrize("results", [fake_muse(), fake_tofu(), all_nan(fake_muse())])
def test_round_trip(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "results.json", with_texts=True)
    found = read_results(tmp_path)
    assert same(found.to_dict(with_texts=True), results.to_dict(with_texts=True))
    assert found.model.texts == results.model.texts
    assert found.checks == results.checks
    for section, columns in results.model.records.items():
        for name, column in columns.items():
            np.testing.assert_array_equal(found.model.records[section][name], column)


def test_nan_and_infinities_are_null_and_come_back_as_nan(tmp_path: Path) -> None:
    results = fake_muse()
    results.model.values = {
        "a": Value(math.nan, -math.inf, math.inf, detail={"D": math.inf}),
        "b": Value(0.5),
    }
    results.model.records = {"s": {"x": np.array([1.0, math.nan, math.inf])}}
    results.write(tmp_path / "results.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    found = read_results(tmp_path / "results.json").model
    assert all(map(math.isnan, (found.values["a"].value, found.values["a"].lower)))
    assert math.isnan(found.values["a"].detail["D"])
    assert found.values["b"].value == 0.5
    np.testing.assert_array_equal(found.records["s"]["x"], [1.0, math.nan, math.nan])


def test_no_text_leaves_unless_asked_and_only_the_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    fake_muse().write(path)
    assert SECRET not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_results(path).model.texts == []
    fake_muse().write(path, with_texts=True)
    assert SECRET in path.read_text()  # the control: the text is there to be found
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"schema": 1}',
        b'{"schema": 2}',
        b'{"schema": "1"}',
    ],
)
def test_damaged_files_are_told_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_results(tmp_path)
    assert "results.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["values", "records", "others", "checks", "curves", "digests"])
@pytest.mark.parametrize("change", ["missing", "number"])
def test_each_damaged_part_is_told(key: str, change: str, tmp_path: Path) -> None:
    content = fake_muse().to_dict()
    if change == "missing":
        del content[key]
    else:
        content[key] = 3
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"results\.json"):
        read_results(tmp_path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_results(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot read"):
        read_results(tmp_path)
