"""Who reads a prompt, and whether they will be the readers after the execution too."""

from collections.abc import Sequence

import torch

from llm_unlearn.exact.ensemble import Decision
from llm_unlearn.exact.selection import BASE_MODEL
from llm_unlearn.serving.engine.answers import Readers, Running
from llm_unlearn.serving.engine.memory import Memory
from llm_unlearn.serving.policy import Target


class Chooser:
    """Chooses readers by the rule of the ensemble.

    Args:
        target: which ensemble certified answers agree with.
    """

    def __init__(self, memory: Memory, target: Target):
        self.memory = memory
        self.target: Target = target

    @property
    def rows_each(self) -> int:
        """How many rows an answer usually has."""
        ensemble = self.memory.ensemble
        return 1 if ensemble.routes_prompts else max(1, ensemble.num_shards)

    def choose(self, asked: Sequence[Running]) -> list[Readers | None]:
        """Readers of each prompt; None where the adapter that was asked for is not served any more."""
        found: dict[int, Readers | None] = {}
        alone = [running for running in asked if running.query.adapter is not None]
        for running in alone:
            found[id(running)] = self._alone(str(running.query.adapter))
        rest = [running for running in asked if running.query.adapter is None]
        if rest:
            for running, decision in zip(rest, self._decisions(rest), strict=True):
                found[id(running)] = self._readers(running, decision)
        return [found[id(running)] for running in asked]

    def _alone(self, name: str) -> Readers | None:
        for adapter in self.memory.adapters.values():
            if adapter.name == name and not adapter.is_withdrawn:
                affected = adapter.shard in self.memory.affected(self.target)
                return Readers((adapter.member,), (name,), (1.0,), (affected,), True)
        return None

    def _decisions(self, asked: Sequence[Running]) -> list[Decision]:
        ensemble = self.memory.ensemble
        length = max(len(running.prompt) for running in asked)
        ids, mask = torch.zeros(2, len(asked), length, dtype=torch.long)
        for row, running in enumerate(asked):
            ids[row, length - len(running.prompt) :] = torch.tensor(running.prompt)
            mask[row, length - len(running.prompt) :] = 1
        texts = [running.query.asked or running.query.prompt for running in asked]
        device = ensemble.device
        return ensemble.decide(ids.to(device), mask.to(device), asked=texts)

    def _readers(self, running: Running, decision: Decision) -> Readers:
        memory, ensemble, chosen = self.memory, self.memory.ensemble, decision.choices
        members = [
            ensemble.nobody if c.adapter == BASE_MODEL else ensemble.adapters[c.adapter]
            for c in chosen
        ]
        affected = memory.affected(self.target)
        if ensemble.rule.aggregate == "merge":  # one for all of them, or for nobody
            marks = [bool(affected)]
        else:
            shards = memory.shards
            marks = [c.adapter != BASE_MODEL and shards[c.adapter] in affected for c in chosen]
        return Readers(
            tuple(members),
            tuple(map(memory.name_of, members)),
            tuple(c.weight for c in chosen),
            tuple(marks),
            self._is_certain(running, decision, affected),
        )

    def _is_certain(self, running: Running, decision: Decision, affected: frozenset[int]) -> bool:
        """Whether the prompt finds the same readers after the execution."""
        memory, ensemble = self.memory, self.memory.ensemble
        if not affected:
            return True
        if not affected.issubset(memory.shards):
            return False  # one that a correction makes is yet to come
        if not ensemble.routes_prompts:
            return True
        if ensemble.rule.aggregate == "nearest":
            # Those that are left are read, and count as affected; one that is not may come back.
            left = {choice.adapter for choice in decision.choices}
            return all(d in left or memory.shards[d] not in affected for d in decision.nearest)
        text = running.query.asked or running.query.prompt
        return not decision.is_close and memory.certify_choice(text, affected)
