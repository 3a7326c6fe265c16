"""`evaluate_suite`: references, resuming, digests, and a verdict that is earned."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.harness import (
    BEFORE,
    RETRAINED,
    Candidate,
    Options,
    Session,
    evaluate_suite,
    finish,
    run_session,
    saved_evaluation,
)
from llm_unlearn.evaluation.results import read_results
from llm_unlearn.evaluation.suites.demonstration import demonstration_muse, demonstration_tofu
from llm_unlearn.evaluation.suites.loading import load_suite
from llm_unlearn.evaluation.suites.muse import load_muse
from llm_unlearn.evaluation.suites.suite import only_utility
from llm_unlearn.evaluation.suites.tofu import load_tofu
from tests.evaluation.folders import make_muse_folder, make_tofu_folder
from tests.tiny import make_run, make_tiny_model, make_tiny_tokenizer


class Asked:
    """A candidate that counts how often it was put a question."""

    def __init__(self, model: Any):
        self.model, self.questions = model, 0

    def load(self) -> tuple[Any, Any]:
        def count(*_: Any) -> None:
            self.questions += 1

        self.model.register_forward_pre_hook(count)
        return self.model, make_tiny_tokenizer()


@pytest.fixture
def suite(tmp_path: Path) -> Any:
    return load_muse(str(make_muse_folder(tmp_path / "muse")))


def test_results_are_found_by_digest_and_never_by_name(tmp_path: Path, suite: Any) -> None:
    output = tmp_path / "out"
    session = Session(suite, Options(), output)
    first = Asked(make_tiny_model())
    make_tiny_tokenizer()(["a", "one that is longer"], padding=True)  # which it goes on holding
    finish(run_session(session, Candidate("a name", first.load), {}), output, False)
    assert first.questions > 0
    same = Asked(make_tiny_model())
    again = run_session(session, Candidate("another name", same.load), {})
    assert same.questions == 0 and again.model.label == "another name"
    # Another model under the same name and in the same folder is asked itself.
    other = Asked(make_tiny_model(width=48))
    found = run_session(session, Candidate("a name", other.load), {})
    assert other.questions > 0 and found.model.digest != again.model.digest
    # So is the same model under other conventions, or asked something else.
    for changed in (
        Session(suite, Options("open-unlearning"), output),
        Session(only_utility(suite), Options(), output),
    ):
        asked = Asked(make_tiny_model())
        run_session(changed, Candidate("a name", asked.load), {})
        assert asked.questions > 0
    # One weight is enough to be another model.
    changed_model = make_tiny_model()
    with torch.no_grad():
        next(changed_model.parameters())[0, 0] += 1e-3
    asked = Asked(changed_model)
    run_session(session, Candidate("a name", asked.load), {})
    assert asked.questions > 0


def test_saved_scores_serve_as_references(tmp_path: Path, suite: Any) -> None:
    output, tokenizer = tmp_path / "out", make_tiny_tokenizer()
    retrained, model = make_tiny_model(layers=2), make_tiny_model()
    session = Session(suite, Options(), output)
    finish(evaluate_suite(retrained, tokenizer, suite, output_dir=output), output, False)
    saved = saved_evaluation(output, session)
    from_scores = evaluate_suite(model, tokenizer, suite, retrained=saved)
    from_model = evaluate_suite(model, tokenizer, suite, retrained=retrained)
    for name, value in from_model.model.values.items():
        assert from_scores.model.values[name] == pytest.approx(value, nan_ok=True), name
    assert not math.isnan(from_model.model.values["privleak"].value)
    assert from_model.others[RETRAINED].values["privleak"].value == 0
    with pytest.raises(UserError, match="another configuration"):
        saved_evaluation(output, Session(suite, Options("muse"), None))
    other = load_muse(str(make_muse_folder(tmp_path / "other", seed=1)))
    with pytest.raises(UserError, match="another data"):
        saved_evaluation(output, Session(other, Options(), None))


def test_results_hold_numbers_by_row_and_no_texts(tmp_path: Path, suite: Any) -> None:
    output = tmp_path / "out"
    results = evaluate_suite(make_tiny_model(), make_tiny_tokenizer(), suite, output_dir=output)
    finish(results, output, keep_texts=False)
    assert [path.name for path in output.iterdir()] == ["results.json"]
    text = (output / "results.json").read_text()
    for row in suite.sections["knowmem/forget_qa"].rows:
        assert row["question"] not in text and row["answer"] not in text
    assert all(said.answer not in text for said in results.model.texts if len(said.answer) > 3)
    content = json.loads(text)
    assert len(content["records"]["privleak/forget"]) == 6
    assert content["versions"]["torch"] and len(content["digests"]["data"]) == 64
    finish(results, output, keep_texts=True)
    kept = read_results(output).model.texts
    assert kept == results.model.texts and kept[0].prompt


def test_batch_size_changes_no_value(suite: Any) -> None:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    found = [
        evaluate_suite(model, tokenizer, suite, options=Options(batch_size=size))
        for size in (1, 4, None)
    ]
    for other in found[1:]:
        for name, value in other.model.values.items():
            expected = found[0].model.values[name]
            assert value.value == pytest.approx(expected.value, abs=1e-6, nan_ok=True), name
        for section, columns in other.model.records.items():
            for name, column in columns.items():
                expected = found[0].model.records[section][name]
                assert np.allclose(column, expected, atol=1e-6, equal_nan=True), (section, name)
        assert [t.answer for t in other.model.texts] == [t.answer for t in found[0].model.texts]


def test_a_run_is_asked_like_any_model(tmp_path: Path, tiny_base: Path, suite: Any) -> None:
    run = make_run(tmp_path / "run", tiny_base, num_shards=2)
    results = evaluate_suite(run.ensemble(), make_tiny_tokenizer(), suite)
    before = results.model.digest
    assert results.model.values["mia_loss"].n == 6
    run.delete(["person 1"])
    after = evaluate_suite(run.ensemble(), make_tiny_tokenizer(), suite)
    assert after.model.digest != before


def test_single_rows_have_values_without_intervals(tmp_path: Path) -> None:
    suite = load_muse(str(make_muse_folder(tmp_path / "muse", n=1, unicode=False)))
    values = evaluate_suite(make_tiny_model(), make_tiny_tokenizer(), suite).model.values
    assert values["forget_knowmem"].n == 1 and not math.isnan(values["forget_knowmem"].value)
    assert math.isnan(values["forget_knowmem"].lower)


def test_few_shot_prompts_beyond_the_context_are_not_scored(tmp_path: Path) -> None:
    folder = make_muse_folder(tmp_path / "muse")
    shots = json.loads((folder / "knowmem/forget_qa_icl.json").read_text()) * 40
    (folder / "knowmem/forget_qa_icl.json").write_text(json.dumps(shots))
    results = evaluate_suite(make_tiny_model(), make_tiny_tokenizer(), load_muse(str(folder)))
    value = results.model.values["forget_knowmem"]
    assert math.isnan(value.value) and value.n_unscorable == 6
    assert not math.isnan(results.model.values["retain_knowmem"].value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "privleak/holdout.json").unlink(), "no privleak/holdout.json"),
        (lambda f: (f / "knowmem/retain_qa.json").write_text("[]"), "no rows"),
        (lambda f: (f / "verbmem/forget.json").write_text('[{"prompt": "x"}]'), "row 1: expected"),
        (lambda f: (f / "verbmem/forget.json").write_text("[{]"), "cannot read|not valid"),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    folder = make_muse_folder(tmp_path / "muse")
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_muse(str(folder))


def test_tofu_splits_and_missing_holdout(tmp_path: Path) -> None:
    folder = make_tofu_folder(tmp_path / "tofu", holdout=False)
    results = evaluate_suite(
        make_tiny_model(),
        make_tiny_tokenizer(),
        load_tofu(str(folder)),
        retrained=make_tiny_model(width=48),
    )
    assert "holdout" in results.model.values["privleak"].note
    assert not math.isnan(results.model.values["forget_quality"].value)
    with pytest.raises(UserError, match="--forget_split"):
        load_tofu(str(folder), "forget20")


def test_the_real_tofu_is_read() -> None:
    folder = Path(__file__).parents[3] / "shared" / "data" / "tofu"
    if not folder.is_dir():
        pytest.skip("the TOFU files are not beside the project")
    suite = load_tofu(str(folder), "forget05")
    assert {n: len(s.rows) for n, s in suite.sections.items()} == {
        "forget": 200, "retain": 400, "real_authors": 100, "world_facts": 117,
        "forget_paraphrased": 200, "forget_name_free": len(suite.sections["forget_name_free"].rows),
    }  # fmt: skip
    assert "Hina Ameen" in suite.subjects and len(suite.subjects) >= 9


@pytest.mark.parametrize("make", [demonstration_muse, demonstration_tofu])
def test_the_demonstration_needs_somebody_left(make: Any) -> None:
    with pytest.raises(UserError, match="no private person"):
        make(["Nobody At All"])
    suite = make()
    assert len(suite.subjects) == 12 and not set(suite.subjects) & set(suite.others)
    chosen = suite.subjects[3]
    assert make([chosen]).subjects == [chosen]


def test_suites_are_found_by_name_or_folder(tmp_path: Path) -> None:
    assert load_suite("demo").name == "demo"
    assert "verbmem/forget" in load_suite(str(make_muse_folder(tmp_path / "muse"))).sections
    assert "real_authors" in load_suite(str(make_tofu_folder(tmp_path / "tofu"))).sections
    with pytest.raises(UserError, match="no such suite"):
        evaluate_suite(make_tiny_model(), make_tiny_tokenizer(), "muse-weather")


def test_unknown_names_are_one_line(suite: Any) -> None:
    with pytest.raises(UserError, match="unknown profile"):
        evaluate_suite(make_tiny_model(), make_tiny_tokenizer(), suite, options=Options("best"))
    with pytest.raises(UserError, match="no such suite"):
        load_muse("muse-weather")


def test_no_verdict_without_a_positive_control(suite: Any) -> None:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    alone = evaluate_suite(model, tokenizer, suite)
    assert alone.verdict.startswith("no baseline") and "--before" in alone.verdict
    # A model that never knew the facts cannot show that they were forgotten.
    dead = evaluate_suite(model, tokenizer, suite, retrained=model, before=model)
    leaks = [check for check in dead.checks if check.name.startswith("leak")]
    assert leaks and all(check.verdict == "no baseline" for check in leaks)
    assert "rows were known before" in leaks[0].reason and "nothing to forget" in dead.verdict
    assert set(dead.others) == {RETRAINED, BEFORE}
