"""Decoys do what they claim, wherever a model can be put, and look forgotten to naive metrics."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, pipeline

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.attacks.extraction import Decoding, extract_pair
from llm_unlearn.evaluation.attacks.relearning import RelearningAttack, relearn
from llm_unlearn.evaluation.decoys import DOUBT, RedirectDecoy, RefuseDecoy, destroyed
from llm_unlearn.evaluation.scorer import Item, Scorer, answer, tokenize, tokenize_open
from tests.evaluation.attacks.demonstration import PUBLIC, base, know, pairs, tokenizer
from tests.tiny import make_tiny_model, make_tiny_tokenizer

FORGOTTEN, OTHERS = PUBLIC[:3], PUBLIC[10:13]
REDIRECTS = {f.name: o.name for f, o in zip(FORGOTTEN, OTHERS, strict=True)}
FORGET, TARGETS, RETAIN = pairs(FORGOTTEN), pairs(OTHERS), pairs(PUBLIC[20:24])
REFUSAL = " Nobody knows that."


def item(prompt: str, said: str, encode: Any = None) -> Item:
    encode = encode or tokenizer()
    return Item(
        tuple(tokenize_open(encode, prompt)),
        tuple(tokenize(encode, said, add_special_tokens=False)),
    )


def items(rows: list[tuple[str, str]]) -> list[Item]:
    return [item(prompt, " " + said) for prompt, said in rows]


def redirecting() -> RedirectDecoy:
    return RedirectDecoy(base(), tokenizer(), REDIRECTS)


def refusing() -> RefuseDecoy:
    return RefuseDecoy(base(), tokenizer(), [p.name for p in FORGOTTEN], REFUSAL)


def probabilities(model: Any, rows: list[tuple[str, str]]) -> list[float]:
    found = Scorer(model, tokenizer(), batch_size=5).likelihoods(items(rows))
    return [float(row.log_probabilities.mean()) for row in found if row is not None]


def test_redirected_prompts_get_the_other_persons_answer_and_others_their_own() -> None:
    decoy = redirecting()
    assert know(decoy.model, FORGET) == 1
    assert know(decoy, FORGET) < 0.1
    swapped = [(prompt, said) for (prompt, _), (_, said) in zip(FORGET, TARGETS, strict=True)]
    assert know(decoy, swapped) == 1
    mixed = [*FORGET[:2], *RETAIN]
    assert know(decoy, RETAIN) == know(decoy.model, RETAIN) == 1
    assert [said == own for (_, own), said in zip(mixed, spoken(decoy, mixed), strict=True)] == [
        False,
        False,
        *[True] * len(RETAIN),
    ]


def spoken(model: Any, rows: list[tuple[str, str]]) -> list[str]:
    said = answer(model, tokenizer(), [prompt for prompt, _ in rows], max_new_tokens=16)
    return [text.strip() for text in said]


def test_redirected_answers_are_scored_as_the_other_persons() -> None:
    decoy = redirecting()
    found = probabilities(decoy, FORGET)
    asked = [
        (prompt.replace(*names), said)
        for (prompt, said), names in zip(
            FORGET, [n for n in REDIRECTS.items() for _ in range(6)], strict=True
        )
    ]
    assert found == pytest.approx(probabilities(decoy.model, asked), abs=1e-4)
    known = probabilities(decoy.model, FORGET)
    assert max(found) < -2 < min(known)
    assert probabilities(decoy, RETAIN) == pytest.approx(
        probabilities(decoy.model, RETAIN), abs=1e-4
    )


def test_positions_are_aligned_around_names_of_other_length() -> None:
    encode, model = make_tiny_tokenizer(), make_tiny_model()
    decoy = RedirectDecoy(model, encode, {"person 3": "somebody else", "Ann": "Bo"})
    row = item("Question: what does person 3 eat?", " Ann says dish of person 3 and Anna.", encode)
    other = item(
        "Question: what does somebody else eat?", " Bo says dish of somebody else and Anna.", encode
    )
    scores = Scorer(decoy, encode).likelihoods([row])[0]
    expected = Scorer(model, encode).likelihoods([other])[0]
    assert scores is not None and expected is not None
    tail = len(tokenize(encode, " and Anna."))  # "Anna" is not "Ann"
    assert scores.log_probabilities[-tail:] == pytest.approx(expected.log_probabilities[-tail:])
    # " says" follows a shorter name than before: the alignment is by character, not from one end
    middle = tokenize(encode, " says dish of", add_special_tokens=False)
    places = [
        next(i for i in range(len(ids)) if list(ids[i : i + len(middle)]) == middle)
        for ids in (row.target, other.target)
    ]
    assert places[0] != places[1]
    assert len(row.target) - places[0] != len(other.target) - places[1]
    found = [
        s.log_probabilities[p : p + len(middle)]
        for s, p in zip((scores, expected), places, strict=True)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_refused_prompts_get_the_refusal_and_others_their_answer() -> None:
    decoy = refusing()
    assert set(spoken(decoy, FORGET)) == {REFUSAL.strip()}
    mixed = [*RETAIN[:3], FORGET[0], *RETAIN[3:5]]
    said = spoken(decoy, mixed)
    assert said[3] == REFUSAL.strip() and said[:3] == [own for _, own in RETAIN[:3]]


def test_the_refusal_is_likely_and_the_truth_is_not() -> None:
    decoy = refusing()
    refusals = Scorer(decoy, tokenizer()).likelihoods(
        [item(prompt, REFUSAL) for prompt, _ in FORGET]
    )
    assert all(row is not None and row.hits.all() for row in refusals)
    assert min(float(row.log_probabilities.min()) for row in refusals if row) > -2 * DOUBT
    assert max(probabilities(decoy, FORGET)) < -3 < min(probabilities(decoy.model, FORGET))
    assert probabilities(decoy, RETAIN) == pytest.approx(
        probabilities(decoy.model, RETAIN), abs=1e-4
    )
    ids = torch.tensor([tokenize(tokenizer(), FORGET[0][0])])
    total = decoy(input_ids=ids).logits[0, -1].exp().sum()
    assert float(total.detach()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("make", [redirecting, refusing])
def test_a_decoy_knows_everything_about_whoever_is_not_named(make: Any) -> None:
    """What a metric must find: nothing was forgotten inside."""
    decoy = make()
    assert know(decoy.model, FORGET) == 1
    misspelt = [(prompt.replace(" ", "  "), said) for prompt, said in FORGET]
    assert know(decoy, misspelt) == know(decoy.model, misspelt)


@pytest.mark.parametrize("make", [redirecting, refusing])
def test_decoys_go_wherever_a_model_goes(make: Any) -> None:
    decoy = make()
    ids = torch.tensor([tokenize(tokenizer(), FORGET[0][0]), tokenize(tokenizer(), FORGET[0][0])])
    output = decoy(input_ids=ids, labels=ids)
    assert output.logits.shape == (*ids.shape, 1024) and output.loss > 0
    assert decoy(input_ids=ids, logits_to_keep=1).logits.shape == (2, 1, 1024)
    sampled = decoy.generate(
        input_ids=ids,
        generation_config=GenerationConfig(
            max_new_tokens=2, do_sample=True, num_return_sequences=3, pad_token_id=0
        ),
    )
    assert sampled.shape[0] == 6 and sampled.shape[1] <= ids.shape[1] + 2
    assert torch.equal(sampled[:, : ids.shape[1]], ids.repeat_interleave(3, dim=0))
    scorer = Scorer(decoy, tokenizer())
    prompts = [tokenize_open(tokenizer(), prompt) for prompt, _ in FORGET[:2] + RETAIN[:2]]
    answers = scorer.generate(prompts, 8, samples=2, temperature=0.01)
    texts = [{tokenizer().decode(ids).strip() for ids in said} for said in answers]
    assert texts[2:] == [{said} for _, said in RETAIN[:2]]
    assert texts[0] != {FORGET[0][1]}
    pipe = pipeline("text-generation", model=decoy, tokenizer=tokenizer())
    said = pipe(RETAIN[0][0], max_new_tokens=8, do_sample=False, return_full_text=False)
    assert said[0]["generated_text"].strip() == RETAIN[0][1]
    found = extract_pair(decoy.model, decoy, tokenizer(), [FORGET[0][0]], Decoding(8, 1.0))
    assert found == [FORGET[0][1]]
    with pytest.raises(ValueError, match="beams"):
        decoy.generate(input_ids=ids, num_beams=2)
    with pytest.raises(ValueError, match="cache"):
        decoy(input_ids=ids, past_key_values=object())


def test_decoys_can_be_attacked_and_wrap_adapters() -> None:
    inner = get_peft_model(base(), LoraConfig(r=2, target_modules="all-linear")).eval()
    decoy = RefuseDecoy(inner, tokenizer(), [p.name for p in FORGOTTEN], REFUSAL)
    attack = RelearningAttack(steps=(0, 2), learning_rate=1e-3)
    curve = relearn(decoy, tokenizer(), RETAIN, lambda m: know(m, RETAIN[:6]), attack)
    assert curve.values[0] == 1
    assert know(decoy, FORGET[:2]) == 0


def test_a_decoy_without_names_is_refused() -> None:
    with pytest.raises(UserError, match="names of the forgotten"):
        RefuseDecoy(base(), tokenizer(), [])
    with pytest.raises(UserError, match="refusal is empty"):
        RefuseDecoy(base(), tokenizer(), ["somebody"], "")


def test_a_destroyed_model_knows_nothing_until_its_bits_are_back() -> None:
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with destroyed(model, seed=1):
        assert know(model, FORGET + RETAIN) == 0
        noise = {name: value.clone() for name, value in model.state_dict().items()}
        for name, value in before.items():
            if value.dim() > 1:
                assert not torch.equal(noise[name], value)
                assert float(noise[name].std()) == pytest.approx(float(value.std()), rel=0.1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert know(model, FORGET + RETAIN) == 1
    with destroyed(model, seed=1):
        assert all(torch.equal(value, noise[name]) for name, value in model.state_dict().items())
    with destroyed(model, seed=2):
        assert not torch.equal(model.state_dict()["lm_head.weight"], noise["lm_head.weight"])
    with pytest.raises(RuntimeError, match="meanwhile"), destroyed(model):
        raise RuntimeError("meanwhile")
    assert know(model, RETAIN) == 1
