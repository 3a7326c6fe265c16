"""Certified texts of models: the ensemble with its affected adapters replaced writes the same."""

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.selection import Rule
from llm_unlearn.serving.certificate import ballot_scores, ballot_weight, certify
from llm_unlearn.serving.sampling import scores_of
from tests.tiny import make_tiny_model

LOG = logging.getLogger(__name__)
SHARDS, AFFECTED, STEPS = 6, (1,), 10
PROMPTS = torch.randint(3, 384, (24, 6), generator=torch.Generator().manual_seed(0))


def randomize(model: PeftModel, shard: int, seed: int, size: float) -> None:
    """A shard that was trained on something else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".shard-{shard}." in name and "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def model() -> PeftModel:
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"])
    base: Any = make_tiny_model(layers=2)
    with torch.no_grad():
        base.lm_head.weight.mul_(20.0)  # a random model is sure of nothing
    adapted: Any = get_peft_model(base, config, adapter_name="shard-0")
    for shard in range(1, SHARDS):
        adapted.add_adapter(f"shard-{shard}", config)
    for shard in range(SHARDS):
        randomize(adapted, shard, shard, 0.1)
    return adapted.eval()


def each_shards(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Next-token log-probabilities of the unaffected shards, each asked alone: (B, n, V)."""
    found = []
    for shard in range(SHARDS):
        if shard not in AFFECTED:
            model.set_adapter(f"shard-{shard}")
            found.append(model(input_ids=ids).logits[:, -1].log_softmax(-1))
    return torch.stack(found, 1)


@torch.no_grad()
def certified_texts(model: PeftModel, aggregate: str) -> tuple[torch.Tensor, list[int]]:
    """Greedy texts of the unaffected shards, and how many tokens of each are certified."""
    ids, lengths, goes_on = PROMPTS, [0] * len(PROMPTS), [True] * len(PROMPTS)
    for _ in range(STEPS):
        log_probs = each_shards(model, ids)
        if aggregate == "vote":
            weight = ballot_weight(len(AFFECTED), SHARDS)
            verdict = certify(ballot_scores(log_probs, SHARDS), weight, slack=1e-4)
        else:
            scores, slack = scores_of(log_probs)
            verdict = certify(scores.sum(-2), len(AFFECTED), slack.sum(-1))
        for row, is_certified in enumerate(verdict.is_certified.tolist()):
            goes_on[row] = goes_on[row] and is_certified
            lengths[row] += goes_on[row]
        ids = torch.cat([ids, verdict.winner[:, None]], -1)
    return ids[:, PROMPTS.shape[1] :], lengths


@pytest.mark.parametrize("aggregate", ["vote", "average"])
def test_certified_texts_are_those_of_every_later_ensemble(
    model: PeftModel, aggregate: Any
) -> None:
    texts, lengths = certified_texts(model, aggregate)
    LOG.info("%s: %d of %d tokens certified", aggregate, sum(lengths), STEPS * len(lengths))
    assert 0 < sum(lengths) < STEPS * len(lengths), "some tokens are certified, some are not"
    names = [f"shard-{shard}" for shard in range(SHARDS)]
    ensemble = ShardEnsemble(model, names, Rule(aggregate)).eval()
    differing = 0
    for seed in range(4):
        for shard in AFFECTED:
            randomize(model, shard, 100 + seed, (0.1, 0.5, 2.0, 0.0)[seed])
        later = ensemble.generate(
            input_ids=PROMPTS, max_new_tokens=STEPS, do_sample=False, eos_token_id=None
        )[:, PROMPTS.shape[1] :]
        for row, certified in enumerate(lengths):
            assert torch.equal(later[row, :certified], texts[row, :certified])
        differing += int((later != texts).any(-1).sum())
    assert differing > 0, "the replaced shards do change what is not certified"
