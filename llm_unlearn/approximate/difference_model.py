"""A model whose answers are those of one set of weights less what another set likes better."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.func import functional_call
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llm_unlearn.errors import UserError

FLOOR = 1e-10  # of a probability


def difference(before_BTV: Tensor, reinforced_BTV: Tensor, alpha: float, form: str) -> Tensor:
    """Logits without what the reinforced model likes better, (B, T, V); `before` where alpha is 0.

    logits: v - alpha ReLU(v_r - v) (arXiv 2310.02238, eq. 1). probabilities: the log of
    p - alpha (p_r - p) (arXiv 2407.06460), which can be negative: cut at 1e-10 and normalised.
    """
    if form == "logits":
        return before_BTV - alpha * (reinforced_BTV - before_BTV).relu()
    p_BTV = before_BTV.softmax(-1)
    lowered_BTV = (p_BTV - alpha * (reinforced_BTV.softmax(-1) - p_BTV)).clamp_min(FLOOR)
    return (lowered_BTV / lowered_BTV.sum(-1, keepdim=True)).log()


class DifferenceModel(PreTrainedModel, GenerationMixin):
    """Two sets of values of some of a model's weights, with `forward` and `generate`.

    Each has its own cache of keys and values. Beam search is refused: it reorders one of them.

    Args:
        model: with the weights before.
        reinforced: other values of some of its parameters, by name.
    """

    is_wrapper = True
    # Attention is the model's business, which has already chosen how to compute it.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, model: Any, reinforced: Mapping[str, Tensor], alpha: float, form: str):
        super().__init__(model.config)
        known = dict(model.named_parameters())
        if missing := sorted(reinforced.keys() - known.keys()):
            raise UserError(f"the reinforced weights are of another model: it has no {missing[0]}")
        self.model = model
        self.reinforced = {name: t.to(known[name]) for name, t in reinforced.items()}
        self.alpha = alpha
        self.form = form
        self.generation_config = model.generation_config
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._takes_positions = "position_ids" in inspect.signature(inner.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) in single precision, from two forward passes.

        Args:
            attention_mask: (B, cached + T), padding on either side.
        """
        options = {"attention_mask": attention_mask, "use_cache": use_cache, **options}
        if attention_mask is not None and self._takes_positions:
            # Those that generation would count, which a model does not always do by itself.
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
            options["position_ids"] = positions[:, -input_ids.shape[1] :]
        second = self._second_cache(past_key_values)
        before = self.model(input_ids=input_ids, past_key_values=past_key_values, **options)
        given = {"input_ids": input_ids, "past_key_values": second, **options}
        other = functional_call(self.model, self.reinforced, (), given)
        logits = difference(before.logits.float(), other.logits.float(), self.alpha, self.form)
        return CausalLMOutputWithPast(
            logits=logits,  # pyright: ignore[reportArgumentType]
            past_key_values=past_key_values,
        )

    def _second_cache(self, cache: Any) -> Any:
        """The reinforced model's cache: it starts as a copy of the empty one and lives with it."""
        if cache is None:
            return None
        if cache.get_seq_length() == 0:
            cache.of_reinforced = copy.deepcopy(cache)
        return cache.of_reinforced

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """As `GenerationMixin.generate`, greedy or sampling.

        Raises:
            ValueError: beam search.
        """
        config = options.get("generation_config") or self.generation_config
        if (options.get("num_beams") or config.num_beams or 1) > 1:
            raise ValueError("a model of two cannot search with beams: use num_beams=1")
        return super().generate(*arguments, **options)  # pyright: ignore[reportAttributeAccessIssue]
