"""The loop of a benchmark: train or load, evaluate, attack, write; what is written is not done again."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from trl import ModelConfig, TrlParser

from llm_unlearn import files
from llm_unlearn.approximate.arguments import UnlearningConfig
from llm_unlearn.approximate.fine_tuning import fine_tune
from llm_unlearn.approximate.result import REPORT_NAME
from llm_unlearn.approximate.unlearn import make_method, unlearn
from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.evaluation.attacks.battery import Battery, Settings
from llm_unlearn.evaluation.attacks.relearning import Curve, area_between, relearn
from llm_unlearn.evaluation.harness import Candidate, Options, Session
from llm_unlearn.evaluation.results import Evaluation, Results, Value, read_results
from llm_unlearn.exact.arguments import S3TConfig
from llm_unlearn.exact.base_model import load_base
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.leaderboard.plan import AGAIN, BEFORE, EXACT, REFINED, RETRAINED, Benchmark
from llm_unlearn.leaderboard.refined import unlearn_row
from llm_unlearn.memorization.observations import Observations
from llm_unlearn.memorizing.scoring import keep_observations
from llm_unlearn.models import load_model, with_adapter

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# Values that the suite does not have, under the names that the catalogue explains.
AREA, RELEARNED = "relearned_area", "relearned"
SECONDS = "unlearning_seconds"


@dataclass(frozen=True)
class Done:
    """A model that answers, and what it cost to make it."""

    load: Callable[[], tuple[Any, Any]]
    seconds: float


def run(benchmark: Benchmark, say: Callable[[str], None]) -> list[str]:
    """Measure every row that is missing.

    Returns:
        What went wrong, a line for each row that could not be made.
    """
    benchmark.claim()
    failures = []
    for seed in range(benchmark.seeds):
        for row in benchmark.all_rows:
            if benchmark.result(row, seed).exists():
                continue
            say(f"{row}, seed {seed}")
            try:
                _Row(benchmark, row, seed).measure()
            except (UserError, RuntimeError) as error:  # torch's, such as memory that ran out
                failures.append(f"{row}, seed {seed}: {' '.join(str(error).split())}")
            gc.collect()
    return failures


@dataclass(frozen=True)
class _Row:
    """One row of the leaderboard under one seed."""

    benchmark: Benchmark
    name: str
    seed: int

    def measure(self) -> None:
        if self.name in EXACT:
            self._measure_exact()
            return
        if self.name != RETRAINED and self._evaluation(RETRAINED) is None:
            raise RunError("there is no retrained model to hold it against")
        done = self._make()
        references = {
            role: self._evaluation(role) for role in (RETRAINED, BEFORE) if role != self.name
        }
        known = {role: one for role, one in references.items() if one is not None}
        self._conclude(done, known, self._curve_of(RETRAINED))

    def _make(self) -> Done:
        world = self.benchmark.world
        if self.name == BEFORE:
            return self._fine_tuned(BEFORE, [*world.forget, *world.retain], self.seed)
        if self.name == RETRAINED:
            return self._fine_tuned(RETRAINED, world.retain, self.seed)
        if self.name == AGAIN:
            return self._fine_tuned(AGAIN, world.retain, self.seed + 1000)
        return self._refined() if self.name in REFINED else self._unlearned()

    def _refined(self) -> Done:
        world, path = self.benchmark.world, self.benchmark.model(self.name, self.seed)
        before, start = self.benchmark.model(BEFORE, self.seed), time.monotonic()
        unlearn_row(world, self.name, self.seed, before, path, load_base)
        return Done(_loader(path), time.monotonic() - start)

    def _fine_tuned(self, name: str, records: Any, seed: int) -> Done:
        path, start = self.benchmark.model(name, self.seed), time.monotonic()
        timing = path / "seconds.json"
        if not timing.exists():
            flags = {**self.benchmark.world.fine_tuning, "seed": seed}
            config = UnlearningConfig(output_dir=str(path), method="ga", **flags)
            model, tokenizer = load_base(self.benchmark.world.base)
            observer = Observations() if name == BEFORE else None
            fine_tune(model, tokenizer, records, config, LoraConfig(**LORA), observer=observer)
            if observer is not None:
                keep_observations(path, records, observer, model, config)
            files.write_bytes(timing, json.dumps(time.monotonic() - start).encode())
        return Done(_loader(path), json.loads(timing.read_bytes()))

    def _unlearned(self) -> Done:
        world, path = self.benchmark.world, self.benchmark.model(self.name, self.seed)
        flags = {**world.unlearning, **world.unlearning_of.get(self.name, {}), "seed": self.seed}
        config = UnlearningConfig(output_dir=str(path), method=self.name, **flags)
        method = make_method(self.name, world.methods.get(self.name))
        retain = world.retain if method.uses_retain else ()
        model, tokenizer = load_base(world.base)
        before = str(self.benchmark.model(BEFORE, self.seed))
        model = with_adapter(model, before, trainable=True)
        start = time.monotonic()
        try:
            unlearn(model, tokenizer, world.forget, retain, config, method)
        except RunError:
            if not (path / REPORT_NAME).exists():  # it diverged, and the last good state is there
                raise
        return Done(_loader(path), time.monotonic() - start)

    def _measure_exact(self) -> None:
        """Train on everybody, delete, rebuild what is missing (of experts nothing is); the reference
        is a run that never had the deleted.
        """
        world = self.benchmark.world
        everybody = self._run("trained", [*world.forget, *world.retain])
        timing, start = everybody.path.parent / "seconds.json", time.monotonic()
        if not timing.exists():
            if not everybody.directory.ledger.requests():
                everybody.delete(sorted({record.subject for record in world.forget}))
            everybody.rebuild()
            files.write_bytes(timing, json.dumps(time.monotonic() - start).encode())
        seconds = json.loads(timing.read_bytes())
        twin = self._run("without", world.retain)
        session, others = self._session(), {}
        others[RETRAINED] = session.evaluate(Candidate(RETRAINED, _of_run(twin)), RETRAINED)
        before = self._evaluation(BEFORE)
        if before is not None:
            others[BEFORE] = before
        curve = self._relearn(*_of_run(twin)())
        self._conclude(Done(_of_run(everybody), seconds), others, curve)

    def _run(self, name: str, records: Any) -> S3TRun:
        world, method = self.benchmark.world, EXACT[self.name]
        path = self.benchmark.model(self.name, self.seed) / name
        key = path.parent / "secret.key"
        key.parent.mkdir(parents=True, exist_ok=True)
        if not key.exists():
            files.write_bytes(key, PartitionKey.from_phrase(f"benchmark {self.seed}").secret)
        flags = ["--output_dir", str(path), "--exact_method", method, "--key_path", str(key)]
        parser = TrlParser([S3TConfig, ModelConfig])  # pyright: ignore[reportArgumentType]
        arguments, model_arguments = parser.parse_args_and_config(
            [*world.exact.get(method, ()), "--model_name_or_path", world.base, *flags]
        )
        model, tokenizer = load_base(world.base)
        made = S3TRun.create(path, records, arguments, model, tokenizer, model_arguments)
        if not made.directory.ledger.requests():  # what a deletion took is not trained again
            made.train(model, tokenizer)
        return made

    def _session(self) -> Session:
        return Session(self.benchmark.world.suite, Options())

    def _evaluation(self, role: str) -> Evaluation | None:
        path = self.benchmark.result(role, self.seed)
        return replace(read_results(path).model, role=role) if path.exists() else None

    def _conclude(self, done: Done, others: dict[str, Evaluation], control: Curve | None) -> None:
        """Evaluate, attack, and write the row; the file comes last, so where it is the row is whole."""
        session = self._session()
        model, tokenizer = done.load()
        evaluation = session.evaluate(Candidate(self.name, lambda: (model, tokenizer)), "model")
        results = session.conclude(evaluation, others)
        curve = self._relearn(model, tokenizer)
        self._add_relearning(results, curve, control or curve)
        results.model.cost[SECONDS] = done.seconds
        results.configuration |= {"method": self.name, "seed": self.seed}
        path = self.benchmark.result(self.name, self.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        results.write(path)

    def _relearn(self, model: Any, tokenizer: Any) -> Curve:
        """Teach every third forgotten question again, and ask the others."""
        battery = Battery(self._session(), {"model": model}, tokenizer, Settings(seeds=1))
        taught = [e.item for e in battery.encoded[::3]]
        asked = [e for number, e in enumerate(battery.encoded) if number % 3]

        def know(one: Any) -> float:
            return float(np.nanmean(battery.knowledge(one, asked)))

        return relearn(model, tokenizer, taught, know, self.benchmark.world.relearning, self.seed)

    def _add_relearning(self, results: Results, curve: Curve, control: Curve) -> None:
        results.model.values[AREA] = Value(area_between(curve, control), n=1)
        results.model.values[RELEARNED] = Value(curve.values[-1], n=1)
        results.curves["relearning: model"] = [
            Value(value, n=1, note=f"step {step}")
            for step, value in zip(curve.steps, curve.values, strict=True)
        ]

    def _curve_of(self, row: str) -> Curve | None:
        path = self.benchmark.result(row, self.seed)
        if not path.exists():
            return None
        values = read_results(path).curves["relearning: model"]
        return Curve(
            self.benchmark.world.relearning.steps, tuple(v.value for v in values), self.seed
        )


def _loader(path: Path) -> Callable[[], tuple[Any, Any]]:
    def load() -> tuple[Any, Any]:
        loaded = load_model(str(path))
        return loaded.model, loaded.tokenizer

    return load


def _of_run(made: S3TRun) -> Callable[[], tuple[Any, Any]]:
    return lambda: (made.ensemble(), load_base(made.directory.shape.name_or_path)[1])
