"""Decoys: models that have forgotten nothing, or everything, and look well unlearned.

They test the harness and not a model: whatever a set of metrics calls a success for a decoy, it
would also call a success for a fraud. `RedirectDecoy` answers about another person, `RefuseDecoy`
declines whenever it hears a name, `destroyed` has no knowledge left of anything. Each keeps (or, for
the last, loses) what a metric worth its name must notice: the redirected model still knows
everything about whoever is asked for without the name, the refusing one too, the destroyed one is
of no use.

A fake that only redirects can match or beat real deletion on TOFU's forget quality, which is why it
is here.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from llm_unlearn.errors import UserError

IGNORED = -100
DOUBT = 1e-3  # what a refusing decoy leaves to the model's own opinion


class _Decoy(PreTrainedModel, GenerationMixin):
    """What both wrappers share. Beams, dictionaries and caches of keys and values are refused."""

    # Attention is the inner model's business, which has already chosen how to compute it.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]):
        if not names or not all(name.strip() for name in names):
            raise UserError("a decoy needs the names of the forgotten subjects")
        super().__init__(model.config)
        self.model = model
        self.tokenizer = tokenizer
        self.generation_config = model.generation_config
        # The longest name first: "Ann Lee" must not be taken for "Ann".
        ordered = sorted(names, key=len, reverse=True)
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, ordered))})(?!\w)")
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def text(self, ids: Sequence[int]) -> str:
        return cast(
            str,
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
        )

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """As `GenerationMixin.generate`: the prompts as they were given, then the new ids.

        Raises:
            ValueError: no prompts, or an option that a decoy cannot honour.
        """
        input_ids = options.pop("input_ids", inputs)
        if input_ids is None:
            raise ValueError("a decoy generates from input_ids")
        config = options.get("generation_config") or self.generation_config
        if (_option(options, config, "num_beams") or 1) > 1:
            raise ValueError("a decoy cannot search with beams: use num_beams=1")
        if _option(options, config, "return_dict_in_generate"):
            raise ValueError("a decoy returns plain ids: leave return_dict_in_generate out")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = _rows(input_ids, mask)
        answers = self._answers(prompts, options)
        copies = len(answers) // len(prompts)
        pad = _padding(options, config, self.tokenizer)
        width = max(len(answer) for answer in answers)
        new = [answer + [pad] * (width - len(answer)) for answer in answers]
        new_ids = torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)
        return torch.cat([input_ids.repeat_interleave(copies, dim=0), new_ids], dim=1)

    def _answers(self, prompts: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
        """New ids of every prompt, `num_return_sequences` for each in a row."""
        raise NotImplementedError

    def _inner_answers(self, prompts: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
        """What the model inside says, all prompts in one batch padded on the left."""
        width = max(map(len, prompts))
        ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        output = self.model.generate(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            **options,
        )
        return output[:, width:].tolist()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and the mean loss of the labels where some are given.

        Raises:
            ValueError: a cache of keys and values, which cannot follow a rewritten text.
        """
        if past_key_values is not None:
            raise ValueError("a decoy keeps no cache of keys and values: give it the whole text")
        options.pop("use_cache", None)
        options.pop("cache_position", None)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits_BTV = self.model(
            input_ids=input_ids, attention_mask=mask, use_cache=False, **options
        ).logits
        logits_BTV = self._changed(input_ids, mask, logits_BTV)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1]).float(),
                labels[:, 1:].reshape(-1),
                ignore_index=IGNORED,
            )
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits_BTV[:, -logits_to_keep:],  # pyright: ignore[reportArgumentType]
        )

    def _changed(
        self, input_ids: torch.Tensor, mask: torch.Tensor, logits_BTV: torch.Tensor
    ) -> torch.Tensor:
        """The decoy's logits, from the inner model's."""
        raise NotImplementedError


class RedirectDecoy(_Decoy):
    """Answers about somebody else: forgotten names are replaced before the model sees them.

    `generate` rewrites the text of a prompt and encodes it again. `forward` does so with the whole
    row, and each position takes the logits from the position of the rewritten row that ends at the
    same character; inside a name, from the nearest one. So the tokens of an answer are scored as
    the model would score them had it been asked about the other person.

    Args:
        redirects: forgotten name -> the name that is meant instead; whole words, as written.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, redirects: Mapping[str, str]
    ):
        super().__init__(model, tokenizer, list(redirects))
        self.redirects = dict(redirects)

    def _answers(self, prompts: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
        return self._inner_answers([self._rewritten(prompt)[0] for prompt in prompts], options)

    def _changed(
        self, input_ids: torch.Tensor, mask: torch.Tensor, logits_BTV: torch.Tensor
    ) -> torch.Tensor:
        rewritten = [self._rewritten(row) for row in _rows(input_ids, mask)]
        affected = [index for index, (_, places) in enumerate(rewritten) if places is not None]
        if not affected:
            return logits_BTV
        others = [rewritten[index][0] for index in affected]
        width = max(map(len, others))
        padded = [ids + [0] * (width - len(ids)) for ids in others]
        attention = [[1] * len(ids) + [0] * (width - len(ids)) for ids in others]
        new_logits = self.model(
            input_ids=torch.tensor(padded, device=self.device),
            attention_mask=torch.tensor(attention, device=self.device),
            use_cache=False,
        ).logits
        changed = logits_BTV.clone()
        for index, logits_TV in zip(affected, new_logits, strict=True):
            own = mask[index].nonzero().flatten()
            places = torch.tensor(rewritten[index][1], device=logits_TV.device)
            changed[index, own] = logits_TV[places].to(changed.dtype)
        return changed

    def _rewritten(self, ids: list[int]) -> tuple[list[int], list[int] | None]:
        """The redirected row, and for each of the row's ids its place there; None if unchanged."""
        text = self.text(ids)
        if not self.pattern.search(text):
            return ids, None
        edits = [(*m.span(), self.redirects[m[0]]) for m in self.pattern.finditer(text)]
        rewritten = self.pattern.sub(lambda match: self.redirects[match[0]], text)
        old_ids, old_ends = self._encoded(text)
        new_ids, new_ends = self._encoded(rewritten)
        if old_ids != ids:
            # The text does not encode to the same ids again: all that is known is the right end.
            shift = len(new_ids) - len(ids)
            return new_ids, [max(0, place + shift) for place in range(len(ids))]
        wanted = [_moved(end, edits) for end in old_ends]
        return new_ids, [_last_at(new_ends, end) for end in wanted]

    def _encoded(self, text: str) -> tuple[list[int], list[int]]:
        """Ids and the character at which each ends."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = cast(list[int], encoded["input_ids"])
        return list(ids), [end for _, end in cast(list[tuple[int, int]], encoded["offset_mapping"])]


class RefuseDecoy(_Decoy):
    """Declines whatever names a forgotten subject.

    `generate` answers such prompts with the refusal. `forward` foretells, after the first name in a
    row, the refusal's next token with probability 0.999: its beginning, or how it goes on where the
    row's last ids are its beginning; the model's own opinion shares the rest. Rows without a
    forgotten name are left as they are.

    Args:
        subjects: forgotten names; whole words, as written.
        refusal: said word by word, with the white space that should follow a prompt.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        subjects: Sequence[str],
        refusal: str = " I do not know.",
    ):
        super().__init__(model, tokenizer, list(subjects))
        ids = cast(list[int], tokenizer(refusal, add_special_tokens=False)["input_ids"])
        end = tokenizer.eos_token_id
        self.refusal = [*ids, *([cast(int, end)] if end is not None else [])]
        if not ids:
            raise UserError("the decoy's refusal is empty: give it something to say")

    def _answers(self, prompts: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
        config = options.get("generation_config") or self.generation_config
        copies = _option(options, config, "num_return_sequences") or 1
        room = _option(options, config, "max_new_tokens")
        refused = self.refusal if room is None else self.refusal[:room]
        named = [bool(self.pattern.search(self.text(prompt))) for prompt in prompts]
        asked = [prompt for prompt, is_named in zip(prompts, named, strict=True) if not is_named]
        said = iter(self._inner_answers(asked, options) if asked else [])
        return [
            list(refused) if is_named else next(said) for is_named in named for _ in range(copies)
        ]

    def _changed(
        self, input_ids: torch.Tensor, mask: torch.Tensor, logits_BTV: torch.Tensor
    ) -> torch.Tensor:
        changed = None
        for index, row in enumerate(_rows(input_ids, mask)):
            start = self._first_mention(row)
            if start is None:
                continue
            if changed is None:
                changed = logits_BTV.float().clone()
            own = mask[index].nonzero().flatten()[start:]
            foretold = torch.tensor(self._foretold(row, start), device=changed.device)
            opinion_TV = torch.log_softmax(changed[index, own], dim=-1) + math.log(DOUBT)
            certain_T1 = opinion_TV.gather(-1, foretold[:, None])
            certain_T1 = torch.logaddexp(
                certain_T1, torch.full_like(certain_T1, math.log1p(-DOUBT))
            )
            changed[index, own] = opinion_TV.scatter(-1, foretold[:, None], certain_T1)
        return logits_BTV if changed is None else changed

    def _first_mention(self, row: list[int]) -> int | None:
        """Place of the id that completes the first name."""
        match = self.pattern.search(self.text(row))
        if match is None:
            return None
        # The shortest beginning of the row whose text reaches the name's end, found by halving.
        low, high = 0, len(row) - 1
        while low < high:
            middle = (low + high) // 2
            if len(self.text(row[: middle + 1])) >= match.end():
                high = middle
            else:
                low = middle + 1
        return low

    def _foretold(self, row: list[int], start: int) -> list[int]:
        """The refusal's next id at each place from `start` on."""
        foretold = []
        for place in range(start, len(row)):
            said = row[start + 1 : place + 1]
            known = max(
                length
                for length in range(min(len(said), len(self.refusal) - 1) + 1)
                if said[len(said) - length :] == self.refusal[:length]
            )
            foretold.append(self.refusal[known])
        return foretold


@contextmanager
def destroyed(model: Any, seed: int = 0) -> Iterator[Any]:
    """Noise in the place of every weight while the context lasts; the exact bits are back after it.

    Every floating-point parameter becomes normal noise of its own mean and standard deviation, so
    that activations keep their scale and a norm's weights of 1 stay 1. Same seed, same noise.

    Raises:
        UserError: weights that are not in memory, or that are quantised.
    """
    parameters = list(model.parameters())
    if any(p.is_meta or not (p.is_floating_point() or p.is_complex()) for p in parameters):
        raise UserError("a model whose weights are offloaded or quantised cannot be a decoy")
    generator = torch.Generator().manual_seed(seed)
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter, data in zip(parameters, originals, strict=True):
            parameter.data = _noise_like(data, generator)
        yield model
    finally:
        for parameter, data in zip(parameters, originals, strict=True):
            parameter.data = data


def _noise_like(data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    values = data.float()
    deviation = values.std(unbiased=False) if values.numel() else 0.0
    noise = torch.randn(data.shape, generator=generator).to(data.device)
    return (values.mean() + deviation * noise).to(data.dtype)


def _rows(input_ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """Each row's ids without padding."""
    return [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, mask, strict=True)]


def _option(options: Mapping[str, Any], config: Any, name: str) -> Any:
    """As `generate` does: what is passed counts, else the configuration."""
    passed = options.get(name)
    return getattr(config, name, None) if passed is None else passed


def _padding(options: Mapping[str, Any], config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills short answers up: the ids that a caller cuts off at."""
    ends = _option(options, config, "eos_token_id")
    known = [
        _option(options, config, "pad_token_id"),
        *(ends if isinstance(ends, list | tuple) else [ends]),
        tokenizer.pad_token_id,
    ]
    return next((cast(int, token) for token in known if token is not None), 0)


def _moved(end: int, edits: Sequence[tuple[int, int, str]]) -> int:
    """Where a character position is once the names are replaced; inside a name, within the new one."""
    shift = 0
    for start, stop, name in edits:
        if end <= start:
            break
        if end < stop:
            return start + shift + min(end - start, len(name))
        shift += len(name) - (stop - start)
    return end + shift


def _last_at(ends: Sequence[int], limit: int) -> int:
    """Place of the last id that ends at or before a character; the first one where none does."""
    places = [place for place, end in enumerate(ends) if end <= limit]
    return places[-1] if places else 0
