"""The served adapters of all shards as one causal language model.

Either the shards' next-token distributions are averaged (the S3T paper averages logits in its
released code and speaks of an aggregate decision, section 3.3; probabilities are the proper
mixture), where a shard with nothing left answers with the base model; or the prompt decides who
answers (`selection.py`). On a permanent core, the core answers in place of the base. Both rules are
constants, so the ensemble is a function of the served adapters only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llm_unlearn.errors import UserError
from llm_unlearn.exact.selection import BASE_MODEL, NOTHING, Choice, Rule, Score, choose
from llm_unlearn.exact.served import depth_of, read_lineage

BASE = "__base__"  # PEFT's name for rows of a mixed batch that no adapter touches


class ShardEnsemble(PreTrainedModel, GenerationMixin):
    """m shards as one model, with `forward` and `generate`.

    The adapters that a row is for answer in one mixed-adapter batch: all m (and m times the
    key-value cache) with `average`, one or two with `select` and `mixture`, where the prompt is first
    read under each adapter. It works in a `transformers` pipeline. Beam search is refused: it
    reorders rows, of which the cache can have several for each.

    Args:
        model: the base model with one PEFT adapter per shard.
        adapters: adapter name of every shard; `nobody` where a shard has nothing left.
        rule: who answers.
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
        nobody: str = BASE,
    ):
        super().__init__(cast(PreTrainedModel, model.get_base_model()).config)
        self.model = model
        self.adapters = adapters
        self.rule = rule or Rule()
        self.nobody = nobody
        self.generation_config = model.generation_config
        self._routing: Routing | None = None

    @classmethod
    def from_run(
        cls,
        base: PreTrainedModel,
        served: str | Path,
        rule: Rule | None = None,
    ) -> "ShardEnsemble":
        """Load `RUN/served`.

        Raises:
            UserError: nothing is served there.
        """
        directories = sorted(
            Path(served).glob("shard-*"), key=lambda path: int(path.name.split("-")[1])
        )
        if not directories:
            raise UserError(f"{served} holds no served adapter: train the run first")
        core = Path(served) / "core"
        nobody = core.name if core.is_dir() else BASE
        model, adapters = None, []
        for directory in directories:
            depth = depth_of(read_lineage(directory))
            name = directory.name if depth else nobody
            adapters.append(name)
            if model is None:
                # PEFT needs an adapter to begin with; one of zeros does no harm.
                model = PeftModel.from_pretrained(base, str(directory), adapter_name=directory.name)
            elif depth:
                model.load_adapter(str(directory), adapter_name=name)
        assert model is not None
        if nobody != BASE:
            model.load_adapter(str(core), adapter_name=nobody)
        return cls(model.eval(), adapters, rule, nobody).eval()

    @property
    def num_shards(self) -> int:
        return len(self.adapters)

    @property
    def routes_prompts(self) -> bool:
        """Whether a prompt decides who answers: `forward` then wants `prompt_lengths`."""
        return self.rule.aggregate != "average"

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
            `logits` (B, T, V) are the log of the mean probability; `loss` is the mean negative
            log-likelihood of the labels under it.

        Raises:
            ValueError: keys and values of an earlier call, where the prompt decides who answers.
        """
        # Outside `generate` nothing remembers who was chosen: a cache would mix the keys of one
        # adapter with the values of another, so none is taken or given.
        is_chosen = self._routing is not None or not self.routes_prompts
        if not is_chosen and options.get("past_key_values") is not None:
            raise ValueError("where the prompt decides who answers, give forward the whole text")
        routing = self._routing or self._route(input_ids, attention_mask, prompt_lengths)
        output = self._ask(routing, input_ids, attention_mask, options)
        mean_BTV = routing.combine(torch.log_softmax(output.logits.float(), dim=-1))
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

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As `GenerationMixin.generate`, greedy or sampling. The prompt decides once who answers.

        Raises:
            ValueError: beam search.
        """
        config = options.get("generation_config") or self.generation_config
        if (options.get("num_beams") or config.num_beams or 1) > 1:
            raise ValueError("an ensemble of shards cannot search with beams: use num_beams=1")
        input_ids = options.get("input_ids", arguments[0] if arguments else None)
        if self.routes_prompts and input_ids is not None:
            copies = options.get("num_return_sequences") or config.num_return_sequences or 1
            choices = self.choose(input_ids, options.get("attention_mask"))
            self._routing = self._routing_of([c for c in choices for _ in range(copies)])
        try:
            return super().generate(*arguments, **options)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self._routing = None

    @torch.no_grad()
    def prompt_scores(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
    ) -> list[list[Score]]:
        """Each prompt under each adapter, and last under the base model.

        Args:
            input_ids: (B, T), padded on either side.

        Returns:
            B times m + 1 scores; `NOTHING` where nothing is left of a shard.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # A token counts if it and the one before it are of the prompt.
        counted = (mask[:, 1:] * mask[:, :-1]).bool()
        if prompt_lengths is not None:
            counted &= positions(mask)[:, 1:] < prompt_lengths.to(mask.device)[:, None]
        columns = []
        for name in (*self.adapters, None):
            if name == self.nobody:
                columns.append([Score(NOTHING, NOTHING)] * len(input_ids))
                continue
            routing = Routing.everybody(len(input_ids), name or self.nobody)
            options = {"position_ids": positions(mask)}
            logits = self._ask(routing, input_ids, mask, options).logits[:, :-1]
            log_p = torch.log_softmax(logits.float(), -1)
            own = log_p.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
            means = (own * counted).sum(-1) / counted.sum(-1).clamp(min=1)
            lowest = own.masked_fill(~counted, 0.0).min(-1).values
            columns.append(
                [Score(*pair) for pair in zip(means.tolist(), lowest.tolist(), strict=True)]
            )
        return [list(row) for row in zip(*columns, strict=True)]

    def choose(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
    ) -> list[list[Choice]]:
        """Who answers each prompt, with which weight."""
        if not self.routes_prompts:
            nobody = [Score(NOTHING, NOTHING)] * self.num_shards
            return [choose(nobody, NOTHING, self.rule)] * len(input_ids)
        scores = self.prompt_scores(input_ids, attention_mask, prompt_lengths)
        return [choose(row[:-1], row[-1].mean, self.rule) for row in scores]

    def _route(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        prompt_lengths: torch.Tensor | None,
    ) -> "Routing":
        return self._routing_of(self.choose(input_ids, mask, prompt_lengths))

    def _routing_of(self, choices: list[list[Choice]]) -> "Routing":
        return Routing.of(choices, self.adapters, self.nobody)

    def _ask(
        self,
        routing: "Routing",
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
        names: list[str] | None = routing.names
        if self.num_shards == 1 and set(names) == set(self.adapters) - {self.nobody}:
            names = None  # the one adapter is active since it was loaded: no bookkeeping by rows
        return self.model(
            input_ids=routing.spread(input_ids),
            attention_mask=None if mask is None else routing.spread(mask),
            adapter_names=names,
            **given,
        )

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
        everybody = [Choice(shard, 1 / self.num_shards) for shard in range(self.num_shards)]
        routing = self._routing_of([everybody] * len(input_ids))
        logits = self._ask(routing, input_ids, attention_mask, options).logits[:, -1, label_ids]
        choices_mB = logits.argmax(dim=-1).view(self.num_shards, input_ids.shape[0])
        tally_BC = torch.nn.functional.one_hot(choices_mB, len(label_ids)).sum(dim=0)
        return tally_BC.argmax(dim=-1), tally_BC

    @property
    def device(self) -> torch.device:
        return self.model.device


@dataclass(frozen=True)
class Routing:
    """Which adapter sees which row: R pairs, the first choice of every row first.

    Attributes:
        rows: index of the row, (R,).
        names: adapter of each pair, R of them.
        log_weights: of its probabilities in the answer, (R,).
        sizes: how many rows have a first choice (all B), a second, ...
    """

    rows: torch.Tensor
    names: list[str]
    log_weights: torch.Tensor
    sizes: tuple[int, ...]

    @classmethod
    def everybody(cls, rows: int, name: str) -> "Routing":
        """One adapter for every row."""
        return cls(torch.arange(rows), [name] * rows, torch.zeros(rows), (rows,))

    @classmethod
    def of(cls, choices: list[list[Choice]], adapters: list[str], nobody: str = BASE) -> "Routing":
        rows, names, weights, sizes = [], [], [], []
        for rank in range(max(map(len, choices))):
            having = [row for row, chosen in enumerate(choices) if len(chosen) > rank]
            sizes.append(len(having))
            for row in having:
                choice = choices[row][rank]
                rows.append(row)
                names.append(nobody if choice.adapter == BASE_MODEL else adapters[choice.adapter])
                weights.append(choice.weight)
        return cls(torch.tensor(rows), names, torch.tensor(weights).log(), tuple(sizes))

    def spread(self, tensor_B: torch.Tensor) -> torch.Tensor:
        """Rows repeated for every adapter that sees them: (B, ...) to (R, ...)."""
        return tensor_B[self.rows.to(tensor_B.device)]

    def combine(self, log_probs_R: torch.Tensor) -> torch.Tensor:
        """Log of the weighted mean of probabilities: (R, T, V) to (B, T, V)."""
        weighted = log_probs_R + self.log_weights.to(log_probs_R.device)[:, None, None]
        combined = weighted[: self.sizes[0]]
        start = self.sizes[0]
        for size in self.sizes[1:]:
            rows = self.rows[start : start + size].to(log_probs_R.device)
            both = torch.logaddexp(combined[rows], weighted[start : start + size])
            combined = combined.index_copy(0, rows, both)
            start += size
        return combined


def positions(attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """Position ids that count the tokens that are not padding."""
    return (attention_mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
