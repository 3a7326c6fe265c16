"""The served adapters of all shards as one causal language model.

Either all shards answer: their next-token distributions are averaged (the S3T paper averages logits in its
released code and speaks of an aggregate decision, section 3.3; probabilities are the proper mixture), they
vote, or their adapters are merged into one; a shard with nothing left answers with the base model. Or the
prompt decides who answers (`selection.py`). On a permanent core, the core answers in place of the base. All
rules are constants, so the ensemble is a function of what is served only.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.exact.keys import Keys, middle
from llm_unlearn.exact.library import CAPACITY, MERGED, Library
from llm_unlearn.exact.mixing import Mixing
from llm_unlearn.exact.routing import BASE, Routing
from llm_unlearn.exact.selection import (
    NOTHING,
    TO_BASE,
    Candidates,
    Choice,
    Rule,
    Score,
    candidates,
    choose,
    everybody,
    is_choice_close,
)
from llm_unlearn.exact.store import KEYS_NAME
from llm_unlearn.exact.words import Words, asked_in

TOKENS_READ_AT_ONCE = 4096
CLOSE = 1e-3  # nats a token; batches of other sizes move them by some 1e-5 in float32


class Decision(NamedTuple):
    """Who answers a prompt, and what that stands on.

    Attributes:
        is_close: rounding could change it, in another batch.
        nearest: with `nearest`, the shards whose keys decide, left or not.
    """

    choices: list[Choice]
    is_close: bool = False
    nearest: tuple[int, ...] = ()


class ShardEnsemble(PreTrainedModel, GenerationMixin):
    """m shards as one model, with `forward` and `generate`.

    The adapters that a row is for answer in one mixed-adapter batch: all m (and m times the
    key-value cache) with `average` and `vote`, one or two with `select` and `mixture`, one with
    `merge`. It works in a `transformers` pipeline. Beam search is refused: it reorders rows, of which
    the cache can have several for each.

    Args:
        model: the base model with one PEFT adapter per shard.
        adapters: adapter name of every shard; `nobody` where a shard has nothing left.
        rule: who answers.
        library: loads adapters that `model` does not hold yet.
        words: tells whose a prompt is; without, every adapter reads every prompt.
        keys: of the shards, for `nearest`.
        nobody: who answers for nobody: `__base__`, or the adapter name of the permanent core.
    """

    # Attention is the base model's business, which has already chosen how to compute it.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        model: PeftModel,
        adapters: list[str],
        rule: Rule | None = None,
        library: Library | None = None,
        words: Words | None = None,
        keys: Keys | None = None,
        nobody: str = BASE,
    ):
        super().__init__(cast(PreTrainedModel, model.get_base_model()).config)
        self.model = model
        self.adapters = adapters
        self.rule = rule or Rule()
        self.mixing = Mixing(model)
        self.library = library
        self.words = words
        self.keys = keys
        self.nobody = nobody
        self.generation_config = model.generation_config
        self._routing: Routing | None = None

    @classmethod
    def from_run(
        cls,
        base: PreTrainedModel,
        served: str | Path,
        rule: Rule | None = None,
        tokenizer: Any = None,
        capacity: int = CAPACITY,
    ) -> "ShardEnsemble":
        """Load `RUN/served`.

        Args:
            tokenizer: of the base model; with it, and the run's key, the words of a prompt find who
                has to read it.
            capacity: how many adapters stay loaded where one or two of them answer.

        Raises:
            UserError: nothing is served there.
        """
        rule = rule or Rule()
        library = Library(base, served, capacity if rule.routes_prompts else None)
        keys, run = None, Path(served).parent
        if rule.aggregate == "nearest":
            keys = Keys.load((run / KEYS_NAME).read_bytes())
        words = _words(library, rule, run, tokenizer)
        names = [library.merge()] if rule.aggregate == "merge" else library.names
        return cls(library.model, names, rule, library, words, keys, library.nobody).eval()

    def update(self, withdrawn: Collection[str] = ()) -> None:
        """Follow what the run serves now, without loading the base model again.

        What is not served any more is overwritten with zeros in memory; nobody may be generating.

        Args:
            withdrawn: adapters that nobody may read, though they are still served.
        """
        assert self.library is not None
        self.mixing.forget()
        if self.rule.aggregate == "merge" and self.adapters == [MERGED]:
            self.library.unmerge()
        self.library.update(withdrawn)
        self.nobody = self.library.nobody
        if self.words is not None:
            run = self.library.served.parent
            self.words = _words(self.library, self.rule, run, self.words.tokenizer)
        is_merged = self.rule.aggregate == "merge"
        self.adapters = [self.library.merge()] if is_merged else self.library.names
        self.mixing.cover(self.model)

    @property
    def num_shards(self) -> int:
        return len(self.adapters)

    @property
    def routes_prompts(self) -> bool:
        """Whether a prompt decides who answers: `forward` then wants `prompt_lengths`."""
        return self.rule.routes_prompts

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Answer with the adapters that the prompt is for.

        Args:
            input_ids: (B, T).
            labels: (B, T), -100 where no loss is wanted.
            prompt_lengths: (B,), how many of a row's tokens decide who answers; default: all.

        Returns:
            `logits` (B, T, V) are the log of the mean probability (`vote`: of the share of votes);
            `loss` is the mean negative log-likelihood of the labels under it.

        Raises:
            ValueError: keys and values of an earlier call, where the prompt decides who answers.
        """
        # Outside `generate` nothing remembers who was chosen: a cache would mix the keys of one
        # adapter with the values of another, so none is taken or given.
        is_chosen = self._routing is not None or not self.routes_prompts
        if not is_chosen and options.get("past_key_values") is not None:
            raise ValueError("where the prompt decides who answers, give forward the whole text")
        routing = self._routing or self._routing_of(
            self.choose(input_ids, attention_mask, prompt_lengths)
        )
        output = self._ask(routing, input_ids, attention_mask, options)
        combine = routing.ballot if self.rule.aggregate == "vote" else routing.combine
        mean_BTV = combine(torch.log_softmax(output.logits.float(), dim=-1))
        loss = None
        if labels is not None:
            loss = torch.nn.functional.nll_loss(
                mean_BTV[:, :-1].reshape(-1, mean_BTV.shape[-1]),
                labels[:, 1:].reshape(-1),
                ignore_index=-100,
            )
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=mean_BTV,  # pyright: ignore[reportArgumentType]
            past_key_values=output.past_key_values if is_chosen else None,
        )

    def generate(self, *arguments: Any, asked: list[str] | None = None, **options: Any) -> Any:
        """As `GenerationMixin.generate`, greedy or sampling. The prompt decides once who answers.

        Args:
            asked: for each row the text that decides, instead of the row's own: the turns of a
                conversation that ask (`words.asked_in`).

        Raises:
            ValueError: beam search.
        """
        config = options.get("generation_config") or self.generation_config
        if (options.get("num_beams") or config.num_beams or 1) > 1:
            raise ValueError("an ensemble of shards cannot search with beams: use num_beams=1")
        input_ids = options.get("input_ids", arguments[0] if arguments else None)
        if self.routes_prompts and input_ids is not None:
            copies = options.get("num_return_sequences") or config.num_return_sequences or 1
            choices = self.choose(input_ids, options.get("attention_mask"), asked=asked)
            self._routing = self._routing_of([c for c in choices for _ in range(copies)])
        try:
            with self.mixing.generation():
                return super().generate(*arguments, **options)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._routing = None

    def asked_in(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The part of a conversation that decides who answers now, for `generate(asked=...)`."""
        if self.words is None:
            raise ValueError("only an ensemble that finds subjects by their words follows a topic")
        return asked_in(messages, self.words.is_telling)

    def choose(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
        asked: list[str] | None = None,
    ) -> list[list[Choice]]:
        """Who answers each prompt, with which weight.

        Args:
            input_ids: (B, T), padded on either side.
            prompt_lengths: (B,), how many tokens of a row are its prompt; default: all.
            asked: as in `generate`.
        """
        decisions = self.decide(input_ids, attention_mask, prompt_lengths, asked)
        return [decision.choices for decision in decisions]

    def decide(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
        asked: list[str] | None = None,
    ) -> list[Decision]:
        """As `choose`, and what each choice stands on."""
        if not self.routes_prompts:
            return [Decision(everybody(self.num_shards))] * len(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        counted = mask.bool()
        if prompt_lengths is not None:
            counted = counted & (positions(mask) < prompt_lengths.to(mask.device)[:, None])
        if self.keys is not None:
            return self._nearest(input_ids, mask, counted)
        found = self._candidates(input_ids, counted, asked)
        scores = self._read(input_ids, mask, counted, found)
        decisions = []
        for row, (shards, is_sure) in enumerate(found):
            if is_sure and len(shards) == 1:
                decisions.append(Decision([Choice(shards[0], 1.0)]))
            elif not shards:
                decisions.append(Decision(TO_BASE))
            else:
                own = [
                    scores.get((row, shard), Score(NOTHING, NOTHING))
                    for shard in range(self.num_shards)
                ]
                base = scores.get((row, None), Score(NOTHING, NOTHING)).mean
                choices = choose(own, base, self.rule, found[row] if self.words else None)
                is_close = is_choice_close(own, base, self.rule, found[row], CLOSE)
                decisions.append(Decision(choices, is_close))
        return decisions

    @torch.no_grad()
    def _nearest(
        self, input_ids: torch.Tensor, mask: torch.Tensor, counted: torch.Tensor
    ) -> list[Decision]:
        """Those whose keys each prompt resembles, as far as they are left, else the base model."""
        assert self.keys is not None
        everybody_base = Routing.pairs(range(len(input_ids)), [BASE] * len(input_ids))
        options = {"position_ids": positions(mask), "use_cache": False}
        output = self._ask(
            everybody_base, input_ids, mask, options | {"output_hidden_states": True}
        )
        decisions = []
        for vector in middle(output.hidden_states, counted).cpu().numpy():
            nearest = self.keys.nearest(vector)
            left = [d for d in nearest if self.adapters[d] != self.nobody]
            choices = [Choice(shard, 1 / len(left)) for shard in left] or TO_BASE
            decisions.append(Decision(choices, nearest=tuple(nearest)))
        return decisions

    def _candidates(
        self, input_ids: torch.Tensor, counted: torch.Tensor, asked: list[str] | None
    ) -> list[Candidates]:
        """Whom each prompt may be for: by its words, or anybody who is left."""
        if self.words is None:
            alive = [shard for shard, name in enumerate(self.adapters) if name != self.nobody]
            return [Candidates(alive, False)] * len(input_ids)
        texts = asked or [
            self.words.tokenizer.decode(row[keep], skip_special_tokens=True)
            for row, keep in zip(input_ids, counted, strict=True)
        ]
        return [candidates(*self.words.evidence(text), self.rule) for text in texts]

    @torch.no_grad()
    def _read(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        counted: torch.Tensor,
        found: list[Candidates],
    ) -> dict[tuple[int, int | None], Score]:
        """Prompts in doubt under their candidates, by row and shard (None: the base model)."""
        pairs: list[tuple[int, int | None]] = []
        for row, (shards, is_sure) in enumerate(found):
            if is_sure and len(shards) == 1:
                continue
            pairs += [(row, shard) for shard in shards]
            pairs += [(row, None)] if shards and not is_sure else []
        size = max(len(input_ids), TOKENS_READ_AT_ONCE // input_ids.shape[1])
        scores: dict[tuple[int, int | None], Score] = {}
        for start in range(0, len(pairs), size):
            chunk = pairs[start : start + size]
            names = [self.nobody if shard is None else self.adapters[shard] for _, shard in chunk]
            routing = Routing.pairs([row for row, _ in chunk], names)
            read = self._likelihoods(routing, input_ids, mask, counted)
            scores |= dict(zip(chunk, read, strict=True))
        return scores

    def _likelihoods(
        self,
        routing: Routing,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        counted: torch.Tensor,
    ) -> list[Score]:
        """Every pair's prompt under its adapter."""
        logits = self._ask(
            routing, input_ids, mask, {"position_ids": positions(mask), "use_cache": False}
        ).logits[:, :-1]
        ids_R, own_R = routing.spread(input_ids), routing.spread(counted)
        own_R = own_R[:, 1:] & own_R[:, :-1]  # a token counts if the one before it does too
        log_p = logits.float().log_softmax(-1).gather(-1, ids_R[:, 1:, None]).squeeze(-1)
        means = (log_p * own_R).sum(-1) / own_R.sum(-1).clamp(min=1)
        lowest = log_p.masked_fill(~own_R, 0.0).min(-1).values
        return [Score(*pair) for pair in zip(means.tolist(), lowest.tolist(), strict=True)]

    def _routing_of(self, choices: list[list[Choice]]) -> Routing:
        return Routing.of(choices, self.adapters, self.nobody)

    def _ask(
        self,
        routing: Routing,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> Any:
        """Every chosen adapter on its rows, in one mixed-adapter batch of R rows."""
        given = {
            name: routing.spread(value)
            if isinstance(value, torch.Tensor) and name == "position_ids"
            else value
            for name, value in options.items()
        }
        names = self.slots_of(routing.names)
        with self.mixing.batch(names, input_ids.device):
            return self.model(
                input_ids=routing.spread(input_ids),
                attention_mask=None if mask is None else routing.spread(mask),
                **given,
            )

    def slots_of(self, names: list[str]) -> list[str]:
        """By which names the model knows some adapters, which are loaded if they have to be."""
        if self.library is None:
            return names
        library = self.library
        before = library.loads, library.changes
        try:
            return library.require(names)
        finally:  # also where some are loaded and another cannot be
            if library.loads != before[0]:
                self.mixing.cover(self.model)
            if library.changes != before[1]:
                self.mixing.forget()  # a slot of the same name holds something else

    @torch.no_grad()
    def vote(
        self,
        input_ids: torch.Tensor,
        label_ids: list[int],
        attention_mask: torch.Tensor | None = None,
    ):
        """Majority vote of the shards for one of some labels as the next token.

        A tie goes to the label listed first, so that the answer depends on nothing else.

        Args:
            input_ids: (B, T), padded on the left.
            label_ids: token id of each of C labels.

        Returns:
            Winning label index (B,), and the tally (B, C).
        """
        options = (
            {"position_ids": None}
            if attention_mask is None
            else {"position_ids": positions(attention_mask)}
        )
        routing = self._routing_of([everybody(self.num_shards)] * len(input_ids))
        logits = self._ask(routing, input_ids, attention_mask, options).logits[:, -1, label_ids]
        choices_mB = logits.argmax(dim=-1).view(-1, input_ids.shape[0])
        tally_BC = torch.nn.functional.one_hot(choices_mB, len(label_ids)).sum(dim=0)
        return tally_BC.argmax(dim=-1), tally_BC

    @property
    def device(self) -> torch.device:
        return self.model.device


def _words(library: Library, rule: Rule, run: Path, tokenizer: Any) -> Words | None:
    """Whose words are whose, in a run whose key is at hand."""
    is_asked = rule.routes_prompts and rule.aggregate != "nearest" and tokenizer is not None
    if not is_asked or not (run / "secret.key").is_file():
        return None
    indexes = library.words()
    if indexes is None:
        return None
    return Words(indexes, PartitionKey((run / "secret.key").read_bytes()), tokenizer)


def positions(attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """Position ids that count the tokens that are not padding."""
    return (attention_mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
