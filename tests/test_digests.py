"""A digest is of what a model or tokenizer is, and not of what it was last asked."""

import copy
from pathlib import Path
from typing import Any

import pytest

from llm_unlearn.digests import tokenizer_digest
from llm_unlearn.exact.run import S3TRun
from tests.tiny import load_tiny, make_tiny_tokenizer, tiny_arguments, tiny_records

CALLS: dict[str, dict[str, Any]] = {
    "padded": {"padding": True},
    "cut": {"truncation": True, "max_length": 4},
    "both": {"padding": "max_length", "truncation": True, "max_length": 9},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_nothing_in_the_digest_of_a_tokenizer(call: str) -> None:
    tokenizer = copy.deepcopy(make_tiny_tokenizer())
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "one that is longer"], **CALLS[call])
    settings = tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation
    assert settings != (None, None)
    assert tokenizer_digest(tokenizer) == before
    now = tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation
    assert now == settings, "the digest changed the tokenizer"


def test_a_token_more_is_another_tokenizer() -> None:
    tokenizer = copy.deepcopy(make_tiny_tokenizer())
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "one that is longer"], padding=True)
    tokenizer.add_tokens(["<more>"])
    assert tokenizer_digest(tokenizer) != before


def test_a_run_goes_on_with_a_tokenizer_that_has_padded(tiny_base: Path, tmp_path: Path) -> None:
    model, tokenizer = load_tiny(tiny_base)
    made = (tmp_path / "run", tiny_records(), tiny_arguments(), model, tokenizer)
    S3TRun.create(*made)
    tokenizer(["a", "one that is longer"], padding=True)
    assert S3TRun.create(*made).path == tmp_path / "run"
