"""The served adapters of all shards as one causal language model.

The shards' next-token distributions are averaged (the paper averages logits in its released code
and speaks of an aggregate decision, section 3.3; probabilities are the proper mixture). A shard
with nothing left answers with the base model. The weights of the average are constants, so the
ensemble is a function of the served adapters only.
"""

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llm_unlearn.errors import UserError
from llm_unlearn.exact.served import read_lineage

BASE = "__base__"  # PEFT's name for rows of a mixed batch that no adapter touches


class ShardEnsemble(PreTrainedModel, GenerationMixin):
    """Probability average of m shards, with `forward` and `generate`.

    All shards answer in one mixed-adapter batch of m times the rows (and with m times the
    key-value cache). It works in a `transformers` pipeline. Beam search is refused: it reorders
    rows, of which the cache has m times as many.

    Args:
        model: the base model with one PEFT adapter per shard.
        adapters: adapter name of every shard; `__base__` where a shard has nothing left.
    """

    # Attention is the base model's business, which has already chosen how to compute it.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, model: PeftModel, adapters: list[str]):
        super().__init__(cast(PreTrainedModel, model.get_base_model()).config)
        self.model = model
        self.adapters = adapters
        self.generation_config = model.generation_config

    @classmethod
    def from_run(cls, base: PreTrainedModel, served: str | Path) -> "ShardEnsemble":
        """Load `RUN/served`.

        Raises:
            UserError: nothing is served there.
        """
        directories = sorted(
            Path(served).glob("shard-*"), key=lambda path: int(path.name.split("-")[1])
        )
        if not directories:
            raise UserError(f"{served} holds no served adapter: train the run first")
        model, adapters = None, []
        for directory in directories:
            lineage = read_lineage(directory)
            depth = len(lineage["nodes"]) if lineage else 0
            name = directory.name if depth else BASE
            adapters.append(name)
            if model is None:
                # PEFT needs an adapter to begin with; one of zeros does no harm.
                model = PeftModel.from_pretrained(base, str(directory), adapter_name=directory.name)
            elif depth:
                model.load_adapter(str(directory), adapter_name=name)
        assert model is not None
        return cls(model.eval(), adapters).eval()

    @property
    def num_shards(self) -> int:
        return len(self.adapters)

    def _expand(self, tensor_B: torch.Tensor | None) -> torch.Tensor | None:
        """Repeat rows for every shard, shard by shard: (B, ...) to (m B, ...)."""
        return (
            None
            if tensor_B is None
            else tensor_B.repeat(self.num_shards, *[1] * (tensor_B.dim() - 1))
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Average the shards.

        Args:
            input_ids: (B, T).
            labels: (B, T), -100 where no loss is wanted.

        Returns:
            `logits` (B, T, V) are the log of the mean probability; `loss` is the mean negative
            log-likelihood of the labels under it.
        """
        shard_logits = self._shard_logits(input_ids, attention_mask, options)
        log_probs = torch.log_softmax(shard_logits.logits.float(), dim=-1)
        log_probs_mBTV = log_probs.view(self.num_shards, input_ids.shape[0], *log_probs.shape[1:])
        mean_BTV = torch.logsumexp(log_probs_mBTV, dim=0) - torch.log(
            torch.tensor(float(self.num_shards))
        )
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
            past_key_values=shard_logits.past_key_values,
        )

    def _shard_logits(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
    ) -> Any:
        if self.adapters != [BASE] and self.num_shards == 1:
            # The one adapter is active since it was loaded; it needs no bookkeeping by rows.
            return self.model(input_ids=input_ids, attention_mask=mask, **options)
        names = [name for name in self.adapters for _ in range(input_ids.shape[0])]
        expanded = {
            name: self._expand(value)
            if isinstance(value, torch.Tensor) and name == "position_ids"
            else value
            for name, value in options.items()
        }
        return self.model(
            input_ids=self._expand(input_ids),
            attention_mask=self._expand(mask),
            adapter_names=names,
            **expanded,
        )

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As `GenerationMixin.generate`, greedy or sampling.

        Raises:
            ValueError: beam search.
        """
        config = options.get("generation_config") or self.generation_config
        if (options.get("num_beams") or config.num_beams or 1) > 1:
            raise ValueError("an ensemble of shards cannot search with beams: use num_beams=1")
        return super().generate(*arguments, **options)  # pyright: ignore[reportAttributeAccessIssue]

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
        logits = self._shard_logits(input_ids, attention_mask, options).logits[:, -1, label_ids]
        choices_mB = logits.argmax(dim=-1).view(self.num_shards, input_ids.shape[0])
        tally_BC = torch.nn.functional.one_hot(choices_mB, len(label_ids)).sum(dim=0)
        return tally_BC.argmax(dim=-1), tally_BC

    @property
    def device(self) -> torch.device:
        return self.model.device


def positions(attention_mask_BT: torch.Tensor) -> torch.Tensor:
    """Position ids that count the tokens that are not padding."""
    return (attention_mask_BT.cumsum(dim=-1) - 1).clamp(min=0)
