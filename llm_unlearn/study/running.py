"""The study's loop: train what is missing, delete in a copy, measure, write each number once.

    OUT/study.json                                       what is studied; another study is refused
    OUT/runs/<configuration>/seed-<s>/                   trained runs, as recipes/s3t.py makes them
    OUT/measurements/<configuration>/<served>/seed-<s>/<deletions>.json   numbers by row
    ... <deletions>.safetensors                          distributions at the ends of orphans' prompts

Whatever is there is not done again, so the same command goes on after an interruption, and started
twice at once it shares the work: a configuration that another process is at is left to it.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.numpy import save
from trl import ModelConfig

from llm_unlearn import files
from llm_unlearn.console import StudyProgress
from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.data.records import Record
from llm_unlearn.demonstration import residents
from llm_unlearn.errors import RunError
from llm_unlearn.exact.arguments import S3TConfig, make_config, make_shape
from llm_unlearn.exact.base_model import load_base
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.selection import Rule
from llm_unlearn.exact.settling import depths_served
from llm_unlearn.study.configurations import SERVED, Configuration, flags_of
from llm_unlearn.study.costs import Costs, costs_of
from llm_unlearn.study.measuring import Measured, System, measure, seconds_a_prompt, timed_prompts
from llm_unlearn.study.plan import Study

BUSY_SECONDS = 0.1


def run_study(study: Study, progress: StudyProgress) -> list[str]:
    """Train and measure whatever is missing.

    Returns:
        What was left to another process.
    """
    study.check()
    study.claim()
    torch.set_num_threads(1)
    jobs = [(one, seed) for seed in range(study.seeds) for one in study.configurations]
    progress.plan(sum(len(one.served) * len(study.counts(one)) for one, _ in jobs))
    busy = []
    for one, seed in jobs:
        lock = study.output / "runs" / one.slug / f"seed-{seed}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with files.locked(lock, "studying it", timeout=BUSY_SECONDS):
                Job(study, one, seed, progress).finish()
        except RunError as error:
            if "is busy" not in str(error):
                raise
            busy.append(f"{one.name}, seed {seed}")
    return busy


@dataclass(frozen=True)
class Job:
    """One configuration under one seed."""

    study: Study
    configuration: Configuration
    seed: int
    progress: StudyProgress

    def finish(self) -> None:
        """Measure what is missing at every number of deletions."""
        served = self.configuration.served
        for count in self.study.counts(self.configuration):
            missing = [s for s in served if not self._is_measured(s, count)]
            if missing:
                self._measure_at(count, missing)
            self.progress.measured(len(served))

    @property
    def path(self) -> Path:
        return self.study.output / "runs" / self.configuration.trained_as / f"seed-{self.seed}"

    def rule(self, served: str) -> Rule:
        arguments, model_arguments = self._arguments()
        return replace(make_config(arguments, model_arguments).rule, **SERVED[served])

    def _is_measured(self, served: str, count: int) -> bool:
        """Whether the numbers are there, of answers given by today's rule."""
        path = self.study.measurement(self.configuration, served, self.seed, count)
        return path.exists() and json.loads(path.read_bytes())["rule"] == asdict(self.rule(served))

    def _measure_at(self, count: int, missing: Sequence[str]) -> None:
        deleted = self.study.order(self.seed)[:count]
        name = f"{self.configuration.name}, seed {self.seed}, {count} deletions"
        if self.configuration.kind == "base":
            self._write(missing[0], count, deleted, System(*self._base()), None, {})
            return
        with self._served_run(deleted) as (run, costs, bystanders):
            for served in missing:
                self.progress.say(f"{name}: {served}")
                model, tokenizer = self._base()
                rule = self.rule(served)
                ensemble = ShardEnsemble.from_run(model, run.directory.served, rule, tokenizer)
                system = System(ensemble, tokenizer, _homes(run, ensemble))
                times = self._times(run, system) if count == 0 else {}
                self._write(served, count, deleted, system, costs, times, bystanders)

    def _write(
        self,
        served: str,
        count: int,
        deleted: list[str],
        system: System,
        costs: Costs | None,
        times: dict[str, float],
        bystanders: Sequence[str] = (),
    ) -> None:
        found = measure(system, self.study.world, deleted)
        path = self.study.measurement(self.configuration, served, self.seed, count)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "configuration": self.configuration.name,
            "served": served,
            "seed": self.seed,
            "deletions": count,
            "deleted": deleted,
            "bystanders": list(bystanders),
            "rule": asdict(self.rule(served)),
            "costs": (asdict(costs) if costs else {}) | times,
            "sections": found.sections,
        }
        _write_measurement(path, content, found)

    @contextmanager
    def _served_run(self, deleted: list[str]) -> Iterator[tuple[S3TRun, Costs, list[str]]]:
        """The run to be asked (as trained, a copy after the deletions, or one trained without them),
        its costs, and the bystanders.
        """
        world = self.study.world
        if self.configuration.kind == "retrained":
            records = [record for record in world.records if record.subject not in deleted]
            run = self._trained(self.path / f"without-{len(deleted)}", records)
            yield (
                run,
                costs_of(run, run.training_seconds()),
                sorted(set().union(*residents(run).values())),
            )
            return
        trained = self._trained(self.path / "trained", world.records)
        if not deleted:
            yield trained, costs_of(trained), []
            return
        copy = self.path / f"{self.configuration.kind}-after-{len(deleted)}"
        files.remove(copy)
        shutil.copytree(trained.path, copy, symlinks=True)
        try:
            run = S3TRun.open(copy)
            spent = [run.delete([subject]).seconds for subject in deleted]
            seconds = sum(spent) / len(spent)
            if self.configuration.kind == "rebuilt":
                model, tokenizer = load_base(self.study.model)
                seconds = sum(spent) + self._train(run, model, tokenizer)
            yield run, costs_of(run, seconds), _bystanders(trained, set(deleted))
        finally:
            files.remove(copy)

    def _trained(self, path: Path, records: list[Record]) -> S3TRun:
        """The run at `path`, made or resumed."""
        world = self.study.world
        arguments, model_arguments = self._arguments()
        config = make_config(arguments, model_arguments)
        model, tokenizer = load_base(self.study.model)
        shape = make_shape(model, tokenizer, model_arguments)
        if (path / "run.json").exists():
            run = S3TRun.open(path)
            # Who answers is the study's business, and decides no bit of what is trained.
            run.directory.ensure_same(replace(config, rule=run.directory.config.rule), shape)
        else:
            key = self.path / "secret.key"
            key.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(key, PartitionKey.from_phrase(f"study {self.seed}").secret)
            arguments.key_path = str(key)
            public = [str(row["question"]) for rows in world.public.values() for row in rows]
            run = S3TRun.create(
                path, records, arguments, model, tokenizer, model_arguments, public_texts=public
            )
        self._train(run, model, tokenizer)
        return run

    def _train(self, run: S3TRun, model: Any, tokenizer: Any) -> float:
        """Train what is missing; returns the seconds."""
        self.progress.say(f"{self.configuration.name}, seed {self.seed}: training")
        report = run.train(model, tokenizer, self.progress)  # pyright: ignore[reportArgumentType]
        return report.seconds

    def _arguments(self) -> tuple[S3TConfig, ModelConfig]:
        world = self.study.world
        flags, lora = flags_of(
            self.configuration, world.name, len(world.subjects), self.study.overrides
        )
        arguments = S3TConfig(output_dir=str(self.path), report_to=[], **flags)
        return arguments, ModelConfig(model_name_or_path=self.study.model, **lora)

    def _base(self) -> tuple[Any, Any]:
        from accelerate import PartialState

        model, tokenizer = load_base(self.study.model)
        return model.to(PartialState().device), tokenizer  # pyright: ignore[reportArgumentType]

    def _times(self, run: S3TRun, system: System) -> dict[str, float]:
        """Seconds a prompt of the system, and of one adapter alone, in the same process."""
        prompts = timed_prompts(system, self.study.world)
        tokens = self.study.world.new_tokens
        shard = next((s for s, depth in depths_served(run.directory).items() if depth), None)
        if shard is None:
            return {}
        model, _ = self._base()
        directory = run.directory.served / run.directory.member_name(shard)
        alone = PeftModel.from_pretrained(model, str(directory)).eval()
        return seconds_a_prompt(system, alone, prompts, tokens)


def _homes(run: S3TRun, ensemble: ShardEnsemble) -> dict[str, set[int]]:
    """Which of the ensemble's adapters learnt from each living subject."""
    if ensemble.num_shards == 1:
        return {subject: {0} for here in residents(run).values() for subject in here}
    positions = {shard: index for index, shard in enumerate(run.directory.shards)}
    homes: dict[str, set[int]] = {}
    for name, subjects in residents(run).items():
        for subject in subjects:
            homes.setdefault(subject, set()).add(positions[name.shard])
    return homes


def _bystanders(trained: S3TRun, deleted: set[str]) -> list[str]:
    """Living subjects who shared a slice with somebody who was deleted."""
    hit = [subjects for subjects in residents(trained).values() if subjects & deleted]
    return sorted(set().union(*hit) - deleted)


def _write_measurement(path: Path, content: dict[str, Any], found: Measured) -> None:
    """The JSON file comes last: where it is, the measurement is whole."""
    if found.distributions is not None:
        # Half precision: three digits are enough for a divergence, and equal rows stay equal.
        data = save({"log_probabilities": found.distributions.astype("float16")})
        files.write_bytes(path.with_suffix(".safetensors"), data)
    files.write_bytes(path, json.dumps(content).encode())
