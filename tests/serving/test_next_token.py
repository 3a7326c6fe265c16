"""The next token of several readers, and what is kept and told of it."""

import pytest
import torch

from llm_unlearn.serving.certificate import ScoreTally, ballot_scores, certify, is_close, rival_of
from llm_unlearn.serving.engine.answers import COUNTED, Running
from llm_unlearn.serving.engine.batch import Row
from llm_unlearn.serving.engine.decoding import Decoding, Readers, next_token
from llm_unlearn.serving.queries import Query


def made(affected: tuple[bool, ...], seed: int = 0) -> tuple[list[Row], Readers]:
    torch.manual_seed(seed)
    log_probs = (torch.randn(5, 40) * 3).log_softmax(-1)
    rows = [Row("a", own, int(own.argmax())) for own in log_probs]
    return rows, Readers(("a",) * 5, ("a@1",) * 5, (0.2,) * 5, affected, True)


@pytest.mark.parametrize("affected", [(False,) * 5, (False, True, False, False, True)])
@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_rule_and_what_is_kept_is_too(affected: tuple[bool, ...], seed: int) -> None:
    """Also where nothing is affected and no certificate is computed."""
    rows, readers = made(affected, seed)
    decoding = Decoding(True, 0.0, 1.0, (0, 0))
    tally = ScoreTally(decoding.weights(readers.shares))
    token = next_token(rows, readers, decoding, 0, tally)
    log_probs = torch.stack([row.log_probs for row in rows])
    assert token.id == int(ballot_scores(log_probs, 5).argmax())
    is_out = torch.tensor(affected) | is_close(log_probs)
    certain, weight = ballot_scores(log_probs[~is_out], 5), float(is_out.sum()) * 1.2
    verdict = certify(certain, weight, 1e-3)
    expected = bool(verdict.is_certified) and int(verdict.winner) == token.id
    assert token.is_certified == (expected or not any(affected))
    (count,) = tally.counts()
    rival = rival_of(certain, weight, token.id, 1e-3)
    assert count.winner == pytest.approx(float(certain[token.id]), abs=1e-6)
    assert count.rival == pytest.approx(rival.reach, abs=1e-6)
    assert count.affected == pytest.approx(weight)


def test_what_an_answer_tells_of_its_tokens() -> None:
    """Rounded numbers, no more than so many, and none of what was forgotten."""
    rows, readers = made((False,) * 5)
    decoding = Decoding(False, 0.0, 1.0, (0, 0))
    running = Running(Query("a", "b"), lambda _: None, [1], decoding)
    running.begin(readers, 1, 0, False)
    for position in range(COUNTED + 9):
        token = next_token(rows, readers, decoding, position, running.stretches[-1].tally)
        running.add(token.id, token.is_certified)
    counts = running.answer("length").counts
    assert len(counts) == COUNTED and len(set(counts)) == 1
    assert counts[0] == tuple(round(number, 4) for number in counts[0])
    running.stretches[-1].tokens = 3
    assert len(running.answer("length").counts) == 3
