"""The only place where a model is run: likelihoods and greedy or sampled answers, in batches.

Rows are sorted by length, so that a batch holds little padding; a batch that does not fit in memory is
halved, and later ones are planned smaller. Likelihoods pad on the right (a causal model cannot look there)
and answers on the left; padding is told by position, never by the id of the padding token, which
many tokenizers share with the end of a text. The plan of batches depends on the rows alone, so
several processes share the batches of one and compute the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerBase

TOKENS_PER_BATCH = 16_384  # padding included
LOGITS_PER_BATCH = 2**28  # numbers: 1 GiB of float32
LOGITS_AT_ONCE = 2**24  # numbers that become probabilities at the same time


class Item(NamedTuple):
    """Token ids: `target` is scored after `prompt`, which has at least one id."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]


class TokenScores(NamedTuple):
    """What a model thinks of each of a target's tokens, in natural logarithms.

    Attributes:
        log_probabilities: of the token.
        entropies: of the next-token distribution; its negative is the mean log-probability.
        deviations: standard deviation of the log-probability under that distribution.
        hits: 1 where the likeliest token was this one.
    """

    log_probabilities: NDArray[np.float64]
    entropies: NDArray[np.float64]
    deviations: NDArray[np.float64]
    hits: NDArray[np.float64]


class Cache(Protocol):
    """Keeps what a batch gave, so that an interrupted evaluation goes on."""

    def get(self, key: Any) -> Any | None: ...

    def put(self, key: Any, value: Any) -> None: ...


class Progress(Protocol):
    def start(self, what: str, total: int) -> None: ...

    def advance(self, rows: int) -> None: ...


class _Plan(NamedTuple):
    """Rows that run together, and what they have in common (the number of new tokens)."""

    rows: list[int]
    new_tokens: int = 0


class Scorer:
    """Asks one model.

    Args:
        model: any causal language model with `device`, `config`, `forward` and `generate`.
        batch_size: most rows of a batch; default: as many as `TOKENS_PER_BATCH` allows.
        cache: where batches are kept; its keys must be bound to the model by whoever makes it.

    Attributes:
        tokens: how many tokens went through the model, padding included.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        cache: Cache | None = None,
        progress: Progress | None = None,
    ):
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"expected a batch of at least one row, got {batch_size}")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.cache = cache
        self.progress = progress
        self.tokens = 0
        self._limit = TOKENS_PER_BATCH
        self._state = PartialState()

    @property
    def context(self) -> float:
        """The longest sequence the model was made for; infinite where it does not say."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or math.inf

    def likelihoods(self, items: Sequence[Item]) -> list[TokenScores | None]:
        """Score the tokens of each target, in one forward pass.

        Returns:
            One for each item, in order; None without a target, or where item and model do not
            fit (longer than `context`).

        Raises:
            ValueError: a target without a token before it.
        """
        if any(item.target and not item.prompt for item in items):
            raise ValueError("a target needs at least one token before it")
        lengths = [len(item.prompt) + len(item.target) for item in items]
        wanted = [i for i, item in enumerate(items) if item.target and lengths[i] <= self.context]
        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", 1)
        limit = min(self._limit, max(1, LOGITS_PER_BATCH // vocabulary))
        plans = [_Plan(rows) for rows in self._batches(wanted, lengths, limit)]
        found = self._run("likelihoods", plans, items, lambda plan: self._score(plan, items))
        return [
            TokenScores(*map(np.asarray, found[i])) if i in found else None
            for i in range(len(items))
        ]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[list[int]]]:
        """Continue each prompt, greedily (temperature 0) or by sampling from the whole vocabulary.

        Of the model's own generation settings only the end-of-sequence ids are used: penalties and
        truncations that a chat model ships with would change what it is found to know.

        Returns:
            For each prompt its `samples` answers as new ids, cut before the end of sequence and where
            the model's context ends; no answer for a prompt that fills it.
        """
        lengths = [len(prompt) for prompt in prompts]
        room = [int(min(max_new_tokens, self.context - length)) for length in lengths]
        plans = []
        for new_tokens in sorted({n for n in room if n > 0}, reverse=True):
            wanted = [i for i, n in enumerate(room) if n == new_tokens and lengths[i]]
            padded = [length + new_tokens for length in lengths]
            limit = max(1, self._limit // samples)
            plans += [_Plan(rows, new_tokens) for rows in self._batches(wanted, padded, limit)]
        options = (samples, temperature, seed)
        found = self._run(
            f"answers {options}",
            plans,
            prompts,
            lambda plan: self._continue(plan, prompts, options),
        )
        return [found.get(i, []) for i in range(len(prompts))]

    @torch.inference_mode()
    def next_token_distributions(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Log-probabilities of the token after each prompt, (prompts, vocabulary).

        Neither cached nor shared between processes: a vocabulary for every prompt is a lot.

        Raises:
            ValueError: a prompt that is empty or fills the model's context.
        """
        lengths = [len(prompt) for prompt in prompts]
        if any(not 0 < length < self.context for length in lengths):
            raise ValueError("expected prompts of at least one token, shorter than the context")

        def compute(plan: _Plan) -> list[Any]:
            ids_BT, mask_BT = self._pad([prompts[row] for row in plan.rows], left=False)
            logits_BTV = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
            last_B = mask_BT.sum(dim=-1) - 1
            rows_B = torch.arange(len(last_B), device=last_B.device)
            log_p_BV = torch.log_softmax(logits_BTV[rows_B, last_B].double(), dim=-1)
            return list(log_p_BV.float().cpu().numpy())

        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", 1)
        limit = min(self._limit, max(1, LOGITS_PER_BATCH // vocabulary))
        plans = [_Plan(rows) for rows in self._batches(list(range(len(prompts))), lengths, limit)]
        found = {
            row: value
            for plan in plans
            for row, value in zip(plan.rows, self._within_memory(plan, compute), strict=True)
        }
        return np.stack([found[row] for row in range(len(prompts))])

    def gradient_norms(self, items: Sequence[Item]) -> list[float]:
        """Mean over parameter tensors of the 2-norm of the gradient of an item's mean loss.

        All floating-point parameters count, frozen ones too (quantised ones cannot). One row at
        a time: as slow as a step of training. NaN without a target or where it does not fit.
        """
        parameters = [p for p in self.model.parameters() if p.is_floating_point()]
        trainable = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            return [self._gradient_norm(item, parameters) for item in items]
        finally:
            for parameter, before in zip(parameters, trainable, strict=True):
                parameter.requires_grad_(before)

    def _gradient_norm(self, item: Item, parameters: list[torch.nn.Parameter]) -> float:
        if not item.target or len(item.prompt) + len(item.target) > self.context:
            return math.nan
        ids = torch.tensor([[*item.prompt, *item.target]], device=self.model.device)
        with torch.enable_grad():
            logits = (
                self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
            )
            predicted = logits[len(item.prompt) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(predicted, ids[0, len(item.prompt) :])
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norms = [g.float().norm() for g in gradients if g is not None]
        return float(torch.stack(norms).mean())

    def _batches(self, wanted: list[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
        """Longest first: what does not fit in memory is found at once."""
        batches: list[list[int]] = []
        for row in sorted(wanted, key=lambda i: (-lengths[i], i)):
            longest = lengths[batches[-1][0]] if batches else 0
            most = min(self.batch_size or math.inf, max(1, limit // max(1, longest)))
            if not batches or len(batches[-1]) >= most:
                batches.append([])
            batches[-1].append(row)
        return batches

    def _run(
        self,
        kind: str,
        plans: list[_Plan],
        inputs: Sequence[Any],
        compute: Callable[[_Plan], list[Any]],
    ) -> dict[int, Any]:
        """What every row of the plans gave; each process computes its share of the batches."""
        if self.progress:
            self.progress.start(kind.split()[0], sum(len(plan.rows) for plan in plans))
        mine: list[tuple[int, Any]] = []
        for number, plan in enumerate(plans):
            if number % self._state.num_processes == self._state.process_index:
                mine += zip(plan.rows, self._cached(kind, plan, inputs, compute), strict=True)
            if self.progress:
                self.progress.advance(len(plan.rows))
        return dict(gather_object(mine) if self._state.num_processes > 1 else mine)

    def _cached(
        self, kind: str, plan: _Plan, inputs: Sequence[Any], compute: Callable[[_Plan], list[Any]]
    ) -> list[Any]:
        key = [kind, plan.new_tokens, [inputs[row] for row in plan.rows]]
        known = self.cache.get(key) if self.cache else None
        if known is None:
            known = self._within_memory(plan, compute)
            if self.cache:
                self.cache.put(key, known)
        return known

    def _within_memory(self, plan: _Plan, compute: Callable[[_Plan], list[Any]]) -> list[Any]:
        try:
            return compute(plan)
        except Exception as error:
            if not should_reduce_batch_size(error) or len(plan.rows) == 1:
                raise
        # Outside the handler, so that the traceback no longer holds the tensors that filled memory.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._limit //= 2
        half = len(plan.rows) // 2
        parts = plan._replace(rows=plan.rows[:half]), plan._replace(rows=plan.rows[half:])
        return [found for part in parts for found in self._within_memory(part, compute)]

    @torch.inference_mode()
    def _score(self, plan: _Plan, items: Sequence[Item]) -> list[Any]:
        batch = [items[row] for row in plan.rows]
        rows = [(*item.prompt, *item.target) for item in batch]
        input_ids_BT, mask_BT = self._pad(rows, left=False)
        options: dict[str, Any] = {}
        if getattr(self.model, "routes_prompts", False):
            # Who answers is decided by the prompt: the right answer must not help to find them.
            lengths = [len(item.prompt) for item in batch]
            options["prompt_lengths"] = torch.tensor(lengths, device=self.model.device)
        logits_BTV = self.model(input_ids=input_ids_BT, attention_mask=mask_BT, **options).logits
        sizes = [len(item.target) for item in batch]
        row_N = np.repeat(np.arange(len(batch)), sizes)
        position_N = np.concatenate(
            [np.arange(len(i.prompt), len(i.prompt) + len(i.target)) for i in batch]
        )
        labels_N = input_ids_BT[row_N, position_N]
        step = max(1, LOGITS_AT_ONCE // logits_BTV.shape[-1])
        parts = [
            _describe(
                logits_BTV[row_N[i : i + step], position_N[i : i + step] - 1],
                labels_N[i : i + step],
            )
            for i in range(0, len(row_N), step)
        ]
        columns = np.concatenate(parts, axis=1)
        return [part.tolist() for part in np.split(columns, np.cumsum(sizes)[:-1], axis=1)]

    @torch.inference_mode()
    def _continue(
        self, plan: _Plan, prompts: Sequence[Sequence[int]], options: tuple[int, float, int]
    ) -> list[Any]:
        samples, temperature, seed = options
        ends = self._end_ids()
        input_ids, mask = self._pad([prompts[row] for row in plan.rows], left=True)
        config = GenerationConfig(
            max_new_tokens=plan.new_tokens,
            do_sample=temperature > 0,
            num_return_sequences=samples if temperature > 0 else 1,
            # Every setting that a model may ship with, back at neutral.
            temperature=temperature or 1.0,
            top_k=0 if temperature > 0 else 50,
            top_p=1.0,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=ends[0] if ends else 0,
            eos_token_id=ends or None,
        )
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed + plan.rows[0])
            output = self.model.generate(
                input_ids=input_ids, attention_mask=mask, generation_config=config
            )
        self.tokens += output.numel() - input_ids.numel()
        new = output[:, input_ids.shape[1] :].tolist()
        count = config.num_return_sequences or 1
        answers = [_before_end(ids, ends) for ids in new]
        return [answers[i : i + count] * (samples // count) for i in range(0, len(answers), count)]

    def _end_ids(self) -> list[int]:
        own = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        own = self.tokenizer.eos_token_id if own is None else own
        if own is None:
            return []
        return [int(end) for end in (own if isinstance(own, list | tuple) else [own])]

    def _pad(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, (B, T). The id at padded places is 0: any will do, none is looked at."""
        width = max(map(len, rows))
        ids = np.zeros((len(rows), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, values in enumerate(rows):
            where = slice(width - len(values), width) if left else slice(0, len(values))
            ids[row, where], mask[row, where] = values, 1
        self.tokens += ids.size
        device = self.model.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 32
) -> list[str]:
    """Greedy answers to some texts, in order, as a tokenizer decodes them."""
    scorer = Scorer(model, tokenizer)
    ids = [tokenize_open(tokenizer, prompt) for prompt in prompts]
    found = scorer.generate(ids, max_new_tokens)
    return [str(tokenizer.decode(said[0])) if said else "" for said in found]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Ids with the special tokens that the tokenizer adds by itself."""
    return list(cast(list[int], tokenizer(text, **options)["input_ids"]))


def tokenize_open(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that goes on: without the end of sequence that some tokenizers add."""
    ids = tokenize(tokenizer, text)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _describe(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> NDArray[np.float64]:
    """The four columns of `TokenScores`, (4, N).

    In double precision: sums over a large vocabulary lose six digits in single.
    """
    log_p_NV = torch.log_softmax(logits_NV.double(), dim=-1)
    p_NV = log_p_NV.exp()
    entropy_N = torch.special.entr(p_NV).sum(-1)
    # Around the mean, not as a difference of squares, which loses the small ones; 0 where p is 0.
    spread_NV = torch.where(p_NV > 0, log_p_NV + entropy_N[:, None], 0.0)
    deviation_N = (p_NV * spread_NV.square()).sum(-1).sqrt()
    own_N = log_p_NV.gather(-1, labels_N[:, None]).squeeze(-1)
    hits_N = (log_p_NV.argmax(-1) == labels_N).double()
    return torch.stack([own_N, entropy_N, deviation_N, hits_N]).cpu().numpy()


def _before_end(ids: list[int], ends: list[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[:position]
    return ids
