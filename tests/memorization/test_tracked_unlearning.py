"""Tracking any approximate training: the same bits, the numbers of the forward passes, and going on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.unlearn import unlearn
from llm_unlearn.data.encoding import encode
from llm_unlearn.memorization.learning_events import ROW_VALUES
from llm_unlearn.memorization.observations import Observations
from llm_unlearn.memorization.probing import probe
from llm_unlearn.memorizing.scoring import keep_observations, observed, score
from llm_unlearn.memorizing.targets import open_target
from llm_unlearn.models import load_model
from llm_unlearn.record_tables import FOLDER, TableFolder
from tests.test_unlearning_recipe import unlearn as run_recipe
from tests.test_unlearning_recipe import write
from tests.tiny import load_tiny, make_rows, tiny_records

RECORDS = tiny_records()
FORGET, RETAIN = RECORDS[:5], RECORDS[5:12]
WEIGHTS = "adapter_model.safetensors"


def config_in(path: Path, **more: Any) -> UnlearningConfig:
    return UnlearningConfig(
        output_dir=str(path), method="graddiff", learning_rate=1e-3, num_train_epochs=3, max_length=64,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, use_cpu=True, bf16=False, **more,
    )  # fmt: skip


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def seen_in(base: Path, config: UnlearningConfig, **more: Any) -> dict[str, np.ndarray]:
    observer = Observations()
    unlearn(*load_tiny(base), FORGET, RETAIN, config, lora=LORA, observer=observer, **more)
    return observer.collect()


def test_the_recipe_keeps_what_it_saw_and_the_result_has_the_same_bits(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = make_rows()
    forget, retain = write(tmp_path / "f.jsonl", rows[:4]), write(tmp_path / "r.jsonl", rows[4:12])
    given = ("--method", "npo", "--forget", forget, "--retain", retain)
    assert run_recipe(tiny_base, tmp_path / "plain", *given) == 0
    assert run_recipe(tiny_base, tmp_path / "tracked", *given, "--track_memorization") == 0
    plain, tracked = ((tmp_path / n / WEIGHTS).read_bytes() for n in ("plain", "tracked"))
    assert plain == tracked
    assert not (tmp_path / "plain" / FOLDER).exists()
    table = TableFolder(tmp_path / "tracked" / FOLDER).read("training")
    assert len(set(table.columns["record"])) > 4 and set(ROW_VALUES) <= set(table.columns)
    assert {"config", "base", "data", "salt_id"} <= set(table.about)
    # What another result takes the place of says nothing about the new one.
    (tmp_path / "tracked" / "refinement.json").write_text("{}")
    assert run_recipe(tiny_base, tmp_path / "tracked", *given) == 0
    assert not TableFolder(tmp_path / "tracked" / FOLDER).names()
    assert not (tmp_path / "tracked" / "refinement.json").exists()


def test_the_first_epoch_shows_the_model_before(tiny_base: Path, tmp_path: Path) -> None:
    """One step an epoch: what it saw is what the model without any training gives."""
    config = config_in(tmp_path / "out", save_strategy="no")
    config = replace(config, per_device_train_batch_size=8, num_train_epochs=1)
    columns = seen_in(tiny_base, config)
    model, tokenizer = load_tiny(tiny_base)
    plain = probe(model, [encode(r, tokenizer, 64, True) for r in [*FORGET, *RETAIN]], 0)
    assert set(columns["index"][columns["index"] < 5]) == set(range(5))
    for name in ROW_VALUES:
        assert columns[name] == pytest.approx(plain[name][columns["index"]], rel=1e-3, abs=1e-5)
    assert columns["tokens"].tolist() == plain["tokens"][columns["index"]].tolist()


def test_an_interrupted_training_goes_on_with_what_it_had_seen(
    tiny_base: Path, tmp_path: Path
) -> None:
    whole = seen_in(tiny_base, config_in(tmp_path / "whole"))
    assert set(whole["epoch"]) == {0, 1, 2}

    def stop(step: int, _total: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seen_in(tiny_base, config_in(tmp_path / "again"), on_step=stop)
    again = seen_in(tiny_base, config_in(tmp_path / "again"))
    assert whole.keys() == again.keys()
    for name, values in whole.items():
        assert values == pytest.approx(again[name], abs=1e-7)


def test_scores_of_a_model_with_its_tables(tiny_base: Path, tmp_path: Path) -> None:
    output, observer = tmp_path / "out", Observations()
    config = config_in(output)
    model, tokenizer = load_tiny(tiny_base)
    unlearn(model, tokenizer, FORGET, RETAIN, config, lora=LORA, observer=observer)
    keep_observations(output, [*FORGET, *RETAIN], observer, model, config)
    target = open_target(output, FORGET)
    target.max_length = 64
    seen = observed(target)
    assert set(seen) == set(score(target).scores) and not np.isnan(seen["confidence"]).any()
    after = score(target, ["gain", "curvature", "confidence"])
    assert np.array_equal(after.scores["confidence"], seen["confidence"])  # tracked, not measured
    loaded = load_model(str(output))
    examples = [encode(r, tokenizer, 64, True) for r in FORGET]
    now = probe(loaded.model, examples, 0)["confidence"]
    with torch.no_grad(), loaded.model.disable_adapter():
        base = probe(loaded.model, examples, 0)["confidence"]
    assert after.scores["gain"] == pytest.approx(now - base, abs=1e-6)
    # Measured numbers are kept, and measured again when the model is another.
    table = target.tables.read("scores")
    score(target, ["curvature"])
    assert target.tables.read("scores").to_bytes() == table.to_bytes()
    changed = bytearray((output / WEIGHTS).read_bytes())
    changed[-2] ^= 1
    (output / WEIGHTS).write_bytes(changed)
    score(open_target(output, FORGET), ["curvature"])
    assert target.tables.read("scores").about["model"] != table.about["model"]
