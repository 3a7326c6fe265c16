"""Extraction from a pair: the decoding against `generate`, and that a deletion gives away."""

import functools
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_unlearn.evaluation.attacks.extraction import (
    Decoding,
    compare_extraction,
    extract_pair,
    extraction_recalls,
    extraction_success,
    guided_log_probabilities,
)
from llm_unlearn.evaluation.scorer import Scorer, tokenize_open
from llm_unlearn.exact.ensemble import ShardEnsemble
from tests.evaluation.attacks.demonstration import (
    FORGET,
    PRIVATE,
    PUBLIC,
    RETAIN,
    base,
    pairs,
    tokenizer,
    tune,
)
from tests.tiny import make_tiny_model, make_tiny_tokenizer

PROMPTS = ["Question: what?", "Question: what does person 3 eat? Answer:", "dish"]


def alone(model: Any) -> list[str]:
    encode = make_tiny_tokenizer()
    prompts = [tokenize_open(encode, prompt) for prompt in PROMPTS]
    said = Scorer(model, encode).generate(prompts, 8)
    return [encode.decode(ids, skip_special_tokens=True).strip() for (ids,) in said]


def test_guidance_follows_the_formula_within_the_plausible_tokens() -> None:
    before = torch.tensor([[0.5, 0.3, 0.19, 0.01]]).log()
    after = torch.tensor([[0.9, 0.09, 0.00001, 0.00999]]).log()
    free = guided_log_probabilities(before, after, guidance=2.0, alpha=0.0)
    torch.testing.assert_close(free, 2 * before - after, atol=1e-4, rtol=1e-4)
    assert free.argmax() == 2  # which the old model says least but for one
    filtered = guided_log_probabilities(before, after, guidance=2.0, alpha=0.5)
    assert filtered.argmax() == 1 and filtered.isinf().tolist() == [[False, False, True, True]]
    shifted = guided_log_probabilities(before + 3, after - 2, guidance=2.0, alpha=0.5)
    torch.testing.assert_close(shifted, filtered)  # logits, not only log-probabilities


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_guidance_of_one_is_the_model_from_before_alone(batch_size: int) -> None:
    before, after = make_tiny_model(), make_tiny_model("qwen3")
    decoding = Decoding(8, guidance=1.0, batch_size=batch_size)
    found = extract_pair(before, after, make_tiny_tokenizer(), PROMPTS, decoding)
    assert found == alone(before)
    plain = Decoding(8, guidance=0.0, alpha=0.0, batch_size=batch_size)
    assert extract_pair(before, after, make_tiny_tokenizer(), PROMPTS, plain) == alone(after)
    assert alone(before) != alone(after)


def test_padding_and_caches_change_nothing() -> None:
    adapted = get_peft_model(make_tiny_model(), LoraConfig(r=2, init_lora_weights=False))
    before = ShardEnsemble(adapted.eval(), ["default", "__base__"]).eval()
    after = make_tiny_model("gpt2")
    together = extract_pair(before, after, make_tiny_tokenizer(), PROMPTS, Decoding(8))
    one_by_one = [
        extract_pair(before, after, make_tiny_tokenizer(), [prompt], Decoding(8))[0]
        for prompt in PROMPTS
    ]
    assert together == one_by_one

    class Forgetful(torch.nn.Module):
        """A model that keeps no cache."""

        def __init__(self, model: Any):
            super().__init__()
            self.model, self.config, self.device = model, model.config, model.device

        def forward(self, **options: Any) -> Any:
            assert options.get("past_key_values") is None
            output = self.model(**{**options, "use_cache": False})
            output.past_key_values = None
            return output

    assert together == extract_pair(
        Forgetful(before), after, make_tiny_tokenizer(), PROMPTS, Decoding(8)
    )


def test_what_does_not_fit_is_not_scored() -> None:
    model = make_tiny_model()
    answers = extract_pair(model, model, make_tiny_tokenizer(), [[5] * 510, [5, 6]], Decoding(4))
    assert answers[0] is None and isinstance(answers[1], str)
    success = extraction_success([None, "a dish", "a"], ["x", "a dish", "a dish"], threshold=1.0)
    assert (success.mean, success.n, success.n_unscorable) == (0.5, 2, 1)
    recalls = extraction_recalls(["a", "a", None], ["a dish", "...", "a"])
    assert recalls[0] == 0.5 and math.isnan(recalls[1]) and math.isnan(recalls[2])
    with pytest.raises(ValueError, match="one answer per reference"):
        extraction_success(["a"], [])


@functools.cache
def faint_memory() -> tuple[Any, Any, list[str], list[str]]:
    """Before: prompts whose forgotten answer is the second choice. After: retrained without it."""
    forget = FORGET[:24]
    others = pairs(PRIVATE[4:])[:24]
    common = [(prompt, said) for (prompt, _), (_, said) in zip(forget, others, strict=True)]
    before = tune(base(), common * 2 + forget, 15)
    after = tune(base(), common, 10)
    return before, after, [prompt for prompt, _ in forget], [said for _, said in forget]


def test_an_exact_deletion_gives_away_what_the_old_model_alone_would_not_say() -> None:
    before, after, prompts, references = faint_memory()
    result = compare_extraction(
        {"before": before, "after": after, "retrained": after},
        tokenizer(),
        prompts,
        references,
        Decoding(8),
    )
    assert result.success["after"].mean == 0
    assert result.success["before"].mean < 0.3 < 0.8 < result.success["pair"].mean
    assert result.gain.lower > 0
    assert result.gain_retrained == result.gain


def test_two_models_that_never_knew_extract_nothing() -> None:
    known = RETAIN + pairs(PUBLIC[30:34])
    before, after = tune(base(), known, 5), tune(base(), RETAIN, 5)
    result = compare_extraction(
        {"before": before, "after": after},
        tokenizer(),
        [prompt for prompt, _ in FORGET],
        [said for _, said in FORGET],
        Decoding(8),
    )
    assert result.success["pair"].mean < 0.05 and result.gain_retrained is None
