"""From a query to tokens."""

from collections.abc import Collection
from typing import Any

from llm_unlearn.errors import UserError
from llm_unlearn.serving.engine.answers import Running
from llm_unlearn.serving.engine.decoding import Decoding
from llm_unlearn.serving.engine.text import TextStream
from llm_unlearn.serving.queries import Listener, Query


class Reading:
    """Prepares queries. May be used from any thread.

    Args:
        model: whose configuration bounds a text and knows what ends one.
        aggregate: how the shards answer.
    """

    def __init__(self, tokenizer: Any, model: Any, aggregate: str):
        self.tokenizer, self.aggregate = tokenizer, aggregate
        self.longest: int = model.config.max_position_embeddings
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = frozenset({*ends, tokenizer.eos_token_id} - {None})

    def begin(self, query: Query, listen: Listener, known: Collection[str]) -> Running:
        """An answer with nothing said yet.

        Args:
            known: names of the adapters that are served.

        Raises:
            UserError: no such adapter, a prompt that is empty or does not fit, labels that begin alike.
        """
        if query.adapter is not None and query.adapter not in known:
            raise UserError(f"no adapter {query.adapter!r} is served")
        prompt = self._encode(query.prompt)
        if not prompt:
            raise UserError("the prompt is empty")
        length = len(prompt) + (1 if query.labels else query.max_tokens)
        if length > self.longest:
            raise UserError(
                f"prompt and answer have {length} tokens, the model reads {self.longest}: "
                "shorten the prompt or ask for fewer"
            )
        labels = self._labels(query.prompt, prompt, query.labels)
        decoding = Decoding.of(query, self.aggregate)
        running = Running(query, listen, prompt, decoding, labels)
        running.stream = TextStream(self.tokenizer, query.stop)
        return running

    def _encode(self, text: str) -> list[int]:
        begin = self.tokenizer.bos_token
        # Chat templates write the beginning of a text themselves.
        is_begun = begin is not None and text.startswith(begin)
        return self.tokenizer(text, add_special_tokens=not is_begun)["input_ids"]

    def _labels(self, text: str, prompt: list[int], labels: tuple[str, ...]) -> tuple[int, ...]:
        """The token that each label begins with, after the prompt."""
        found = []
        for label in labels:
            space = "" if text[-1:].isspace() or label[:1].isspace() else " "
            ids = self._encode(text + space + label)
            same = next(
                (i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b),
                len(prompt),
            )
            if same < len(prompt) or len(ids) == len(prompt):
                ids, same = self.tokenizer(space + label, add_special_tokens=False)["input_ids"], 0
            if not ids[same:]:
                raise UserError(f"the label {label!r} has no token")
            found.append(ids[same])
        if len(set(found)) < len(found):
            raise UserError(
                "two labels begin with the same token: choose labels that begin differently"
            )
        return tuple(found)
