"""A LoRA that answers each row of a batch with that row's own weight, from 0 (the base) to 1."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from llm_unlearn.approximate.detector import Detector, highest
from llm_unlearn.approximate.encoder import Encoder
from llm_unlearn.errors import UserError


class RowWeights:
    """Hooks that scale what a LoRA adds, row by row; they do nothing while no weights are set.

    Raises:
        UserError: an adapter whose output is no plain product of two matrices.
    """

    def __init__(self, model: PeftModel):
        self.weights_B: Tensor | None = None
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        factors = [factor for layer in layers for factor in layer.lora_B.values()]
        is_plain = all(isinstance(f, nn.Linear) for f in factors)
        is_plain = is_plain and not any(
            layer.lora_embedding_B or any(layer.use_dora.values()) for layer in layers
        )
        if not factors or not is_plain:
            raise UserError("only a plain LoRA on linear layers can be weighed by row")
        for factor in factors:
            factor.register_forward_hook(self._scale)

    def _scale(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if self.weights_B is None:
            return output
        # Beams and samples of one prompt lie side by side.
        copies, left = divmod(len(output), len(self.weights_B))
        if output.dim() != 3 or left:
            raise UserError("the model mixes the rows of a batch: they cannot be weighed by row")
        weights_B = self.weights_B.repeat_interleave(copies).to(output)
        return output * weights_B[:, None, None]

    @contextmanager
    def set(self, weights_B: Tensor) -> Iterator[None]:
        before = self.weights_B
        self.weights_B = weights_B
        try:
            yield
        finally:
            self.weights_B = before


class SoftAdapter(nn.Module):
    """An adapter that is weighed by how much a prompt is about what was to be forgotten.

    Every row is scored by itself, without padding: the prompt that `generate` is given, decided once
    for all that is written after it; in `forward` the first `prompt_lengths` tokens, or the whole row
    where they are not given or the prompt is no more than one token.

    Attributes:
        adapted: the model with its adapter, which can be trained on.
        encoders: of each detector; several may share one, which then looks at a prompt once.
        routes_prompts: tells an evaluation to say how long prompts are.
    """

    routes_prompts = True
    is_wrapper = True

    def __init__(
        self,
        adapted: Any,
        tokenizer: Any,
        detectors: Sequence[Detector],
        encoders: Sequence[Encoder],
    ):
        super().__init__()
        self.adapted = adapted
        self.tokenizer = tokenizer
        self.detectors = detectors
        self.encoders = encoders
        self._rows = RowWeights(adapted)

    @property
    def config(self) -> Any:
        return self.adapted.config

    @property
    def generation_config(self) -> Any:
        return self.adapted.generation_config

    @property
    def device(self) -> torch.device:
        return self.adapted.device

    def weights(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Of each row, (B,).

        Args:
            input_ids: (B, T), padded on either side.
            prompt_lengths: (B,), how many of a row's tokens decide; default: all.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, mask, strict=True)]
        if prompt_lengths is not None:
            given = zip(rows, prompt_lengths.tolist(), strict=True)
            rows = [row[:length] if length > 1 else row for row, length in given]
        features = {
            encoder: row_features(encoder, self.tokenizer, rows, lower_layers(encoder))
            for encoder in set(self.encoders)
        }
        pairs = zip(self.detectors, self.encoders, strict=True)
        return highest([detector.weights(features[encoder]) for detector, encoder in pairs])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As the model's own.

        Raises:
            ValueError: keys and values of an earlier call; the text decides, so it must be whole.
        """
        if options.get("past_key_values") is not None:
            raise ValueError("the prompt decides how the adapter is weighed: give the whole text")
        with self._rows.set(self.weights(input_ids, attention_mask, prompt_lengths)):
            return self.adapted(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options
            )

    def generate(self, input_ids: Tensor, **options: Any) -> Any:
        """As in Transformers, with beams and samples."""
        weights_B = self.weights(input_ids, options.get("attention_mask"))
        with self._rows.set(weights_B):
            return self.adapted.generate(input_ids=input_ids, **options)


def row_features(
    encoder: Encoder, tokenizer: Any, rows: Sequence[Sequence[int]], layers: Sequence[int]
) -> Tensor:
    """Masked means of an encoder's layers, (B, L, D), of rows of the model's ids."""
    if not encoder.is_causal:
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        rows = encoder.tokenize(texts)
    return encoder.layers(rows, layers)


def lower_layers(encoder: Encoder) -> range:
    """The lower half of an encoder's layers, counted from 1."""
    return range(1, max(1, encoder.layer_count // 2) + 1)
