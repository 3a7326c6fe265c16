"""The profiles of published code agree with plain, independent implementations of its formulas."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from llm_unlearn.evaluation.harness import Options, evaluate_suite
from llm_unlearn.evaluation.prompts import Prompting
from llm_unlearn.evaluation.results import Results
from llm_unlearn.evaluation.suites.muse import load_muse
from llm_unlearn.evaluation.suites.tofu import load_tofu
from tests.evaluation import plain_muse, plain_open_unlearning
from tests.evaluation.folders import make_muse_folder, make_tofu_folder
from tests.tiny import make_tiny_model, make_tiny_tokenizer

TOLERANCE = 1e-6


def learned(model: PreTrainedModel, texts: list[str], steps: int = 60) -> PreTrainedModel:
    """A model that has seen some texts: else every score would be noise, and hits would be none."""
    tokenizer = make_tiny_tokenizer()
    ended = [f"{text}{tokenizer.eos_token}" for text in texts]  # or it would talk to the last token
    batch = tokenizer(ended, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """One that was trained on the forget set's people, and one on others (and some of its style)."""
    said = "On day {d} person {i} eats dish number {n}."
    asked = "Question: what does person {i} eat on day {d}?\nAnswer: dish number {n}."
    texts = [" ".join(said.format(d=d, i=i, n=i * d) for d in range(4)) for i in range(6)]
    texts += [asked.format(d=d, i=i, n=i * d) for i in range(6) for d in range(2)]
    others = [t.replace("person", "stranger" if n % 2 else "person") for n, t in enumerate(texts)]
    return learned(make_tiny_model(), texts), learned(make_tiny_model(width=48), others, steps=15)


def evaluate(
    models: tuple[Any, Any], suite: Any, profile: str, template: str = "question", **options: Any
) -> Results:
    return evaluate_suite(
        models[0],
        make_tiny_tokenizer(),
        suite,
        retrained=models[1],
        options=Options(profile, Prompting(template), **options),
    )


def assert_values(results: Results, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        ours = results.model.values[name].value
        assert ours == pytest.approx(value, abs=TOLERANCE, rel=TOLERANCE, nan_ok=True), name


@pytest.mark.parametrize(
    "options", [{}, {"empty_answer": True}, {"long_texts": True}], ids=["plain", "empty", "long"]
)
def test_open_unlearning_on_muse(
    tmp_path: Path, models: tuple[Any, Any], options: dict[str, Any]
) -> None:
    folder = make_muse_folder(tmp_path / "muse", **options)
    expected = plain_open_unlearning.muse(models[0], make_tiny_tokenizer(), folder, models[1])
    results = evaluate(models, load_muse(str(folder)), "open-unlearning", with_gradients=True)
    assert len(expected.values) >= 11
    if options.get("long_texts"):
        # Texts beyond the model's context: the plain code goes on where the positions are not
        # defined; here they are not scored, and are counted.
        kept = {n: v for n, v in expected.values.items() if n.endswith("knowmem")}
        expected = expected._replace(values=kept)
        assert results.model.values["mia_loss"].n_unscorable > 0
    assert_values(results, expected.values)
    if not options:
        rows = results.model.records["verbmem/forget"]["extraction_strength"]
        assert np.allclose(rows, expected.rows["extraction_strength"], atol=TOLERANCE)
        assert results.model.values["exact_memorization"].value > 0.1, "nothing was hit"


@pytest.mark.parametrize("chat", [False, True], ids=["tags", "chat"])
def test_open_unlearning_on_tofu(tmp_path: Path, models: tuple[Any, Any], chat: bool) -> None:
    folder = make_tofu_folder(tmp_path / "tofu", empty_answer=not chat)
    tokenizer = make_tiny_tokenizer()
    expected = plain_open_unlearning.tofu(
        models[0], tokenizer, folder, retrain=models[1], chat=chat
    )
    results = evaluate(
        models,
        load_tofu(str(folder)),
        "open-unlearning",
        "chat" if chat else "question",
        with_gradients=True,
    )
    assert len(expected.values) >= 20
    assert_values(results, expected.values)
    assert results.model.values["forget_quality"].detail["n_model"] == 6


def test_muse(tmp_path: Path, models: tuple[Any, Any]) -> None:
    folder = make_muse_folder(tmp_path / "muse")
    tokenizer, read = make_tiny_tokenizer(), lambda name: json.loads((folder / name).read_text())
    results = evaluate(models, load_muse(str(folder)), "muse")
    expected = {
        "forget_verbmem": plain_muse.verbmem(models[0], tokenizer, read("verbmem/forget.json"))
    }
    for split in ("forget", "retain"):
        shots, rows = (read(f"knowmem/{split}_qa{end}.json") for end in ("_icl", ""))
        expected[f"{split}_knowmem"] = plain_muse.knowmem(models[0], tokenizer, rows, shots)
    for name, rows in expected.items():
        value = results.model.values[name].value
        assert value == pytest.approx(100 * np.mean(rows), abs=TOLERANCE)
        assert value > 0, f"{name} compares nothing with nothing"
    texts = [read(f"privleak/{split}.json") for split in ("forget", "holdout")]
    reference = plain_muse.privleak(models[1], tokenizer, *texts)
    privacy = plain_muse.privleak(models[0], tokenizer, *texts, reference["auc"]["Min-40%"])
    values = results.model.values
    assert values["privleak"].value == pytest.approx(privacy["privleak"], abs=1e-4)
    for name, attack in (("mia_min_k", "Min-40%"), ("mia_loss", "PPL"), ("mia_zlib", "PPL/zlib")):
        assert values[name].value == pytest.approx(privacy["auc"][attack], abs=TOLERANCE), name
    assert values["mia_loss"].value < 0.5, "members stand out: near 0 in MUSE's orientation"


def test_default_mends_what_the_others_do(tmp_path: Path, models: tuple[Any, Any]) -> None:
    """The differences that docs/evaluation.md lists, one assertion each."""
    folder = make_muse_folder(tmp_path / "muse", empty_answer=True)
    suite = load_muse(str(folder))
    ours, peer = (evaluate(models, suite, name) for name in ("default", "open-unlearning"))
    # An empty reference cannot be scored: 0 would count as forgotten.
    assert ours.model.values["forget_knowmem"].n_unscorable == 1
    assert peer.model.records["knowmem/forget_qa"]["rougeL_f1"][0] == 0
    assert math.isnan(ours.model.records["knowmem/forget_qa"]["rougeL_f1"][0])
    # A text of which nothing is extracted scores 0, not 1/m.
    untrained = (make_tiny_model(width=48), models[1])
    ours, peer = (evaluate(untrained, suite, name) for name in ("default", "open-unlearning"))
    assert ours.model.values["extraction_strength"].value == 0
    assert peer.model.values["extraction_strength"].value > 0


def test_references_are_never_assumed(tmp_path: Path, models: tuple[Any, Any]) -> None:
    suite = load_tofu(str(make_tofu_folder(tmp_path / "tofu")))
    for profile in ("default", "open-unlearning"):
        options = Options(profile)
        results = evaluate_suite(models[0], make_tiny_tokenizer(), suite, options=options)
        for name in ("privleak", "forget_quality", "mia_reference", "tug_of_war"):
            value = results.model.values[name]
            assert math.isnan(value.value) and "--retrain" in value.note
