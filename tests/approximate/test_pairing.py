"""Vectors of texts, and the analogous pairs that are chosen by them."""

from pathlib import Path

import pytest
import torch

from llm_unlearn.approximate.encoder import Encoder, load_encoder, make_encoder, masked_mean
from llm_unlearn.approximate.pairing import analogous_pairs, overlap
from llm_unlearn.errors import UserError
from tests.tiny import VOCABULARY, make_tiny_model, make_tiny_tokenizer

TEXTS = ["person 3 eats a dish", "resident", "what does person 11 eat on day 2 and on day 4?"]


def save_text_encoder(directory: Path) -> str:
    """A small RoBERTa of the tests' own, as safetensors."""
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=130, pad_token_id=0,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def test_a_masked_mean_looks_at_no_padding() -> None:
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    assert masked_mean(states, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 4.0]]


def test_rows_do_not_depend_on_their_batch() -> None:
    encoder = make_encoder(None, make_tiny_model(), make_tiny_tokenizer())
    together = encoder.vectors(TEXTS)
    alone = torch.cat([encoder.vectors([text]) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(3))
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_the_first_position_of_a_causal_model_is_left_out() -> None:
    model, rows = make_tiny_model(), [[5, 6, 7]]
    states = model(torch.tensor(rows), output_hidden_states=True).hidden_states
    encoder = make_encoder(None, model, make_tiny_tokenizer())
    found = encoder.layers(rows, [1, 3])[0]
    assert torch.allclose(found[0], states[1][0, 1:].mean(0), atol=1e-6)
    assert torch.allclose(found[1], states[3][0, 1:].mean(0), atol=1e-6)
    whole = Encoder(model, make_tiny_tokenizer()).layers(rows, [1])[0, 0]
    assert torch.allclose(whole, states[1][0].mean(0), atol=1e-6)


def test_a_text_encoder_is_a_masked_mean_of_length_one(tmp_path: Path) -> None:
    encoder = load_encoder(save_text_encoder(tmp_path))
    ids = torch.tensor([encoder.tokenize([TEXTS[0]])[0]])
    mean = encoder.model(input_ids=ids).last_hidden_state[0].mean(0)
    expected = mean / mean.norm()
    assert torch.allclose(encoder.vectors(TEXTS)[0], expected, atol=1e-5)
    assert [len(rows) for rows in encoder.tokens(TEXTS)] == [
        len(ids) for ids in encoder.tokenize(TEXTS)
    ]


def test_an_encoder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load the text encoder") as error:
        load_encoder(str(tmp_path / "none"))
    assert "\n" not in str(error.value)


def test_overlap_by_hand() -> None:
    assert overlap("a b c d", "a b c x", 3) == 0.5
    assert overlap("A, b c!", "a b c", 3) == 1.0
    assert overlap("a b", "x a b y", 5) == 0.0, "one 2-gram against 4-word sequences"
    assert overlap("", "a b", 2) == 0.0


def test_the_nearest_that_is_no_near_duplicate_is_taken() -> None:
    forget = ["anna lives in bergen with two cats", "otto bakes bread at night"]
    candidates = [
        "anna lives in bergen with two cats and a dog",  # nearest to the first, but the same text
        "maria lives in oslo with a parrot",
        "paul bakes cakes in the morning",
    ]
    forget_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates_MD = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.2, 0.8]])
    assert analogous_pairs(forget, candidates, forget_ND, candidates_MD, 5, 0.5) == [1, 2]
    assert analogous_pairs(forget, candidates, forget_ND, candidates_MD, 5, 1.0) == [0, 2]
    with pytest.raises(UserError, match="too_close"):
        analogous_pairs(forget, candidates[:1], forget_ND, candidates_MD[:1], 5, 0.5)


def test_a_pair_can_serve_two_and_the_retain_set_can_be_small() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert analogous_pairs(["a b", "c d"], ["e f"], vectors, vectors[:1], 2, 0.5) == [0, 0]
