"""The shard ensemble: one model whose next-token distribution is the mean of the shards'."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import pipeline

from llm_unlearn.errors import UserError
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.run import S3TRun
from tests.tiny import load_tiny, make_run

PROMPTS = [
    "Question: what does person 1 eat?",
    "Question: what does person 2 eat on day 1? Answer:",
]


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> S3TRun:
    path = tmp_path_factory.mktemp("ensemble") / "run"
    return make_run(path, tiny_base, num_shards=3, num_slices=1, num_sequences=1)


def batch(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer.padding_side = "left"
    encoded = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    return encoded["input_ids"], encoded["attention_mask"]


def alone(run: S3TRun, base: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every shard, each loaded and run on its own: (m, B, T, V)."""
    logits = []
    for shard in run.directory.shards:
        model = PeftModel.from_pretrained(
            load_tiny(base)[0], str(run.directory.served / f"shard-{shard}")
        )
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids, attention_mask=mask).logits)
    return torch.log_softmax(torch.stack(logits), dim=-1)


def test_forward_is_the_mean_of_the_shards_probabilities(run: S3TRun, tiny_base: Path) -> None:
    ensemble = run.ensemble()
    ids, mask = batch(load_tiny(tiny_base)[1])
    each = alone(run, tiny_base, ids, mask)
    with torch.no_grad():
        output = ensemble(
            input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)
        )
    torch.testing.assert_close(output.logits.exp(), each.exp().mean(dim=0), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(each[0], each[1])  # the shards do differ
    target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    expected = torch.nn.functional.nll_loss(
        each.exp().mean(dim=0).log()[:, :-1].flatten(0, 1), target.flatten(), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)


def test_greedy_generation_follows_the_mean_with_and_without_a_cache(
    run: S3TRun, tiny_base: Path
) -> None:
    ensemble = run.ensemble()
    ids, mask = batch(load_tiny(tiny_base)[1])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = ensemble.generate(input_ids=ids, attention_mask=mask, **options)
    plain = ensemble.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, plain)
    for _ in range(5):
        following = (
            alone(run, tiny_base, ids, mask)[:, :, -1]
            .exp()
            .mean(dim=0)
            .argmax(dim=-1, keepdim=True)
        )
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    assert torch.equal(cached, ids)


def test_a_dead_shard_answers_with_the_base_model(
    run: S3TRun, tiny_base: Path, tmp_path: Path
) -> None:
    other = make_run(tmp_path / "run", tiny_base, num_shards=2, num_slices=1, num_sequences=1)
    subjects = [r.subject for r in other.directory.slices.read(other.directory.slices.names[0])]
    other.delete(subjects[:1])
    ensemble = other.ensemble()
    assert ensemble.adapters == ["__base__", "shard-1"]
    ids, mask = batch(load_tiny(tiny_base)[1])
    with torch.no_grad():
        base = torch.log_softmax(
            load_tiny(tiny_base)[0](input_ids=ids, attention_mask=mask).logits, dim=-1
        )
        got = ensemble(input_ids=ids, attention_mask=mask).logits
    expected = torch.stack([base, alone(other, tiny_base, ids, mask)[1]]).exp().mean(dim=0)
    torch.testing.assert_close(got.exp(), expected, rtol=1e-4, atol=1e-6)


def test_vote_counts_shards_and_breaks_ties_by_order(run: S3TRun, tiny_base: Path) -> None:
    ids, mask = batch(load_tiny(tiny_base)[1])
    labels = [5, 6, 7]
    winner, tally = run.ensemble().vote(ids, labels, mask)
    choices = alone(run, tiny_base, ids, mask)[:, :, -1, labels].argmax(dim=-1)
    for row in range(len(PROMPTS)):
        counts = [int((choices[:, row] == label).sum()) for label in range(3)]
        assert tally[row].tolist() == counts
        assert winner[row] == counts.index(max(counts))


def test_it_answers_in_a_pipeline(run: S3TRun, tiny_base: Path) -> None:
    tokenizer = load_tiny(tiny_base)[1]
    ensemble = run.ensemble()
    generator = pipeline("text-generation", model=ensemble, tokenizer=tokenizer)
    said = generator(PROMPTS[0], max_new_tokens=4, do_sample=False, return_full_text=False)[0][
        "generated_text"
    ]
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    direct = ensemble.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert said == tokenizer.decode(
        direct[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_beams_are_refused_and_an_untrained_run_says_so(
    run: S3TRun, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="num_beams=1"):
        run.ensemble().generate(input_ids=torch.tensor([[3]]), num_beams=2)
    with pytest.raises(UserError, match="train the run first"):
        ShardEnsemble.from_run(load_tiny(tiny_base)[0], tmp_path / "served")
