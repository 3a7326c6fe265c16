"""ICU: forget a text while learning one that is like it, each only until it is forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_unlearn.approximate.method import DISTRIBUTIONS, Card, Method, flag, flags

if TYPE_CHECKING:
    from llm_unlearn.approximate.sample_stopping import ForgottenWhen
    from llm_unlearn.approximate.session import Session
    from llm_unlearn.approximate.step import Step, Term
    from llm_unlearn.data.records import Record

PAIR = "forget/pair"


@dataclass
class ICU(Method):
    """L = -forget_weight CE(forget) + pair_weight CE(pair) + kl_weight KL(before || now)(pair)."""

    forget_weight: float = flag(1.0, "weight of gradient ascent on the forget set")
    pair_weight: float = flag(
        0.5, "weight of learning each forget record's analogous retain record"
    )
    kl_weight: float = flag(1.0, "weight of the KL divergence to the old model on that record")
    ngram: int = flag(5, "words of the sequences by which near-duplicates are told")
    too_close: float = flag(
        0.5, "no pair is a record that shares more of its word sequences with a forget record"
    )
    stop_bleu: float = flag(0.01, "a row is forgotten when its continuation's BLEU is below")
    stop_similarity: float = flag(0.3, "or its BERTScore F1 is below (with --encoder)")
    stop_accuracy: float = flag(
        0.5994, "all rows are, when the mean memorization accuracy is below"
    )
    stop_extraction: float = flag(0.0499, "and the mean extraction likelihood is below this")
    stop_ngram: int = flag(10, "tokens of the n-grams of the extraction likelihood")
    stop_stride: int = flag(10, "every how many tokens of a row it is looked for")
    stop_beams: int = flag(1, "beams of the continuation (the paper's code: 2)")

    card = Card(
        title="Iterative contrastive unlearning",
        source="Tang et al., Learn while Unlearn, arXiv 2407.20271, and its released code",
        idea="Gradient ascent on each forget record, while the retain record most like it is learnt and "
        "kept near the old model. Each round asks the model for every forget record: those whose "
        "continuation is wrong are left out together with their pair, until they come back.",
        use_when="Verbatim text is to be forgotten, and the retain data has texts of the same kind.",
        fails_when="The retain data has nothing like the forget set: the pair then protects little. The "
        "stopping rule sees one continuation a row; other prompts can still bring the text out. Short "
        "or generic answers can look forgotten from the start.",
        differs="The KL divergence is over positions without padding (the code counts padding), against "
        "a frozen copy. A pair is no near-duplicate of a forget record. BLEU is of n-grams no "
        "longer than the true answer. Extraction likelihood is looked for every ten tokens, over the "
        "same tokens that must follow, and its mean over rows decides (the code: any row).",
    )
    preset = flags(
        learning_rate=5e-6, per_device_train_batch_size=8, gradient_accumulation_steps=1,
        num_train_epochs=30.0, adam_beta2=0.98, lr_scheduler_type="constant", stop_samples="icu",
    )  # fmt: skip

    @property
    def forgotten_when(self) -> ForgottenWhen:
        from llm_unlearn.approximate.sample_stopping import ForgottenWhen

        return ForgottenWhen(
            self.stop_bleu,
            self.stop_similarity,
            self.stop_accuracy,
            self.stop_extraction,
            self.stop_ngram,
            self.stop_stride,
            self.stop_beams,
        )

    def __post_init__(self) -> None:
        from llm_unlearn.errors import UserError

        if min(self.ngram, self.stop_ngram, self.stop_stride, self.stop_beams) < 1:
            raise UserError("--ngram, --stop_ngram, --stop_stride and --stop_beams are at least 1")
        if not 0 < self.too_close <= 1:
            raise UserError(f"--too_close is above 0 and at most 1, got {self.too_close:g}")

    def needs(self) -> Mapping[str, set[str]]:
        return {PAIR: {DISTRIBUTIONS}} if self.kl_weight else {}

    def sides(self, session: Session) -> Mapping[str, list[Record]]:
        from llm_unlearn.approximate.encoder import make_encoder, text_of
        from llm_unlearn.approximate.pairing import analogous_pairs

        encoder = make_encoder(session.encoder, session.model, session.tokenizer)
        forget, retain = (
            [text_of(r) for r in records] for records in (session.forget, session.retain)
        )
        vectors = encoder.vectors(forget), encoder.vectors(retain)
        nearest = analogous_pairs(forget, retain, *vectors, self.ngram, self.too_close)
        session.notes.append(
            f"{len(forget)} forget records are paired with {len(set(nearest))} of {len(retain)} retain records"
        )
        return {PAIR: [session.retain[number] for number in nearest]}

    def terms(self, step: Step) -> list[Term]:
        from llm_unlearn.approximate.losses import divergence

        forget, pair = step["forget"], step[PAIR]
        terms = [forget.per_token("forget", forget.log_probabilities_BT, self.forget_weight)]
        if self.pair_weight:
            terms.append(pair.per_token("pair", -pair.log_probabilities_BT, self.pair_weight))
        if self.kl_weight:
            values_BT = divergence(pair.reference_distributions_BTV, pair.distributions_BTV)
            terms.append(pair.per_position("pair_kl", values_BT, self.kl_weight))
        return terms
