"""Going on after an interruption: with the same request only, told by what files hold."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from llm_unlearn import files
from llm_unlearn.approximate.claim import LOCK_NAME
from llm_unlearn.approximate.trainer import UnlearningTrainer
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.errors import RunError, UserError
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import make_tiny_tokenizer


def rows(answer: str, column: str) -> str:
    """A file with a row for each forget record."""
    forget, _ = forget_and_retain()
    told = [{"prompt": r.content["prompt"], column: f" {answer}"} for r in forget]
    return "\n".join(json.dumps(row) for row in told)


# The method, the flag that names a file, its suffix, and two contents.
FILES: list[tuple[str, str, str, Callable[[str], str]]] = [
    ("replacement", "redact", ".txt", lambda word: word),
    ("replacement", "replacements", ".jsonl", lambda word: rows(word, "completion")),
    ("altpo", "alternates", ".jsonl", lambda word: rows(word, "alternate")),
    ("refusal", "refusals", ".txt", lambda word: f"I know nothing of a {word}."),
]


def run(output: Path, method: str, lora: LoraConfig = LORA, encoder: Any = None, **flags: Any):
    forget, retain = forget_and_retain()
    config = arguments(output, method, save_strategy="epoch", num_train_epochs=3)
    given = make_method(method, flags)
    unlearn(
        knowing_model(), make_tiny_tokenizer(), forget, retain if given.uses_retain else [], config,
        given, lora, encoder=encoder,
    )  # fmt: skip
    return load_file(output / "adapter_model.safetensors")


def interrupt(monkeypatch: pytest.MonkeyPatch, output: Path, method: str, **flags: Any) -> None:
    """Break off in the second epoch."""
    original = UnlearningTrainer.training_step

    def break_off(self: Any, *given: Any, **named: Any) -> Any:
        if int(self.state.epoch or 0) >= 1:
            raise KeyboardInterrupt
        return original(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(UnlearningTrainer, "training_step", break_off)
        with pytest.raises(KeyboardInterrupt):
            run(output, method, **flags)
    assert list((output / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize(("method", "flag", "suffix", "content"), FILES)
def test_a_file_with_other_contents_is_another_request(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    flag: str,
    suffix: str,
    content: Any,
) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_text(content("dish"))
    flags = {flag: str(path)}
    whole = run(tmp_path / "whole", method, **flags)
    interrupt(monkeypatch, tmp_path / "parts", method, **flags)
    path.write_text(content("number"))
    with pytest.raises(UserError, match="another request"):
        run(tmp_path / "parts", method, **flags)
    path.write_text(content("dish"))
    parts = run(tmp_path / "parts", method, **flags)
    assert all(parts[name].equal(whole[name]) for name in whole)


def test_another_scale_of_the_adapter_is_another_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, tmp_path / "out", "npo")
    other = copy.deepcopy(LORA)
    other.lora_alpha = 32
    with pytest.raises(UserError, match="another request"):
        run(tmp_path / "out", "npo", lora=other)


def test_a_second_process_is_told_that_the_directory_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would remove what the first one works with, and their checkpoints would mix."""
    original, told = UnlearningTrainer.training_step, []

    def beside(self: Any, *given: Any, **named: Any) -> Any:
        with (
            pytest.raises(RunError, match="busy") as caught,
            files.locked(work / LOCK_NAME, "looking", timeout=0),
        ):
            pass
        told.append(caught)
        return original(self, *given, **named)

    work = tmp_path / "out" / "checkpoints"
    interrupt(monkeypatch, tmp_path / "out", "npo")
    before = sorted(path.name for path in work.iterdir())
    with files.locked(work / LOCK_NAME, "the first"):
        for flags in ({}, {"beta": 0.3}):  # the same request, and another
            with pytest.raises(RunError, match="busy: another process is unlearning there"):
                run(tmp_path / "out", "npo", **flags)
    assert sorted(path.name for path in work.iterdir()) == before
    monkeypatch.setattr(UnlearningTrainer, "training_step", beside)
    run(tmp_path / "out", "npo")
    assert told and not work.exists()


def test_what_another_request_left_before_its_first_checkpoint_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "out" / "checkpoints"
    work.mkdir(parents=True)
    (work / "request.json").write_text("{}")
    (work / "reference-forget.bin").write_text("of the other")
    seen = []
    original = UnlearningTrainer.training_step
    monkeypatch.setattr(
        UnlearningTrainer,
        "training_step",
        lambda self, *a, **k: (
            seen.append({p.name for p in work.iterdir()}),
            original(self, *a, **k),
        )[1],
    )
    run(tmp_path / "out", "npo")
    assert seen[0] == {"request.json", LOCK_NAME}
