"""What tracking costs, and which score finds what a model has memorized.

    python benchmarks/memorization.py                      the demonstration: 4 minutes on one core
    python benchmarks/memorization.py --runs 64 --repeats 8
    python benchmarks/memorization.py --tofu full.json --authors 10 --base tofu-base

First the same fine-tuning with and without tracking, in turns, timed without loading (a training loop each);
then every score of a model's records beside the counterfactual reference: Spearman's correlation with a 95 %
bootstrap interval over records, the same without what length and the base model's confidence explain, and the
seconds that the score takes beyond a training that is done anyway. Interrupted? The same command goes on with the
run of the reference that is missing (--output_dir).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_unlearn import demonstration
from llm_unlearn.console import print_table
from llm_unlearn.data import world
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.data.sources import read_rows

ROWS_PER_AUTHOR = 20
AFTERWARDS = ("gain", "curvature", "holdout")


class Setting(NamedTuple):
    """A base model, what it learns, and what is held out."""

    name: str
    base: str
    records: list[Record]
    holdout: list[Record]
    flags: dict[str, Any]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=16, help="of the reference")
    parser.add_argument("--repeats", type=int, default=4, help="of each timed training")
    parser.add_argument("--tofu", type=Path, help="TOFU's full.json")
    parser.add_argument("--authors", type=int, default=10)
    parser.add_argument("--base", help="--tofu: a model, as benchmarks/tofu_base.py makes one")
    parser.add_argument("--epochs", type=float, help="(the setting's own)")
    parser.add_argument("--learning_rate", type=float, help="(the setting's own)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/memorization-benchmark"))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_setting(arguments: argparse.Namespace) -> Setting:
    if arguments.tofu is None:
        private = world.private_people(96)
        known, unknown = (
            make_records(world.records(group), subject_column="subject")
            for group in (private[:48], private[48:72])
        )
        made = Setting("demonstration", str(demonstration.MODEL_PATH), known, unknown,
                       dict(demonstration.FINE_TUNING))  # fmt: skip
    else:
        rows = read_rows(arguments.tofu)
        cut = ROWS_PER_AUTHOR * arguments.authors
        known, unknown = (
            make_records(part, rows_per_subject=ROWS_PER_AUTHOR)
            for part in (rows[:cut], rows[cut : cut + cut // 2])
        )
        flags = {**demonstration.FINE_TUNING, "max_length": 256, "learning_rate": 2e-3,
                 "num_train_epochs": 10, "per_device_train_batch_size": 16}  # fmt: skip
        made = Setting("TOFU", str(arguments.base), known, unknown, flags)
    asked = {"num_train_epochs": arguments.epochs, "learning_rate": arguments.learning_rate}
    given = {name: value for name, value in asked.items() if value is not None}
    return made._replace(flags={**made.flags, **given})


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def config_of(setting: Setting, output: Path, **more: Any) -> Any:
    from llm_unlearn.approximate.arguments import UnlearningConfig

    return UnlearningConfig(output_dir=str(output), method="ga", **{**setting.flags, **more})


class Seconds(NamedTuple):
    """Processor seconds of one training loop, and of the tracking in it: others on the machine do not count."""

    whole: float
    tracking: float = 0.0


def timed_observer() -> Any:
    """An observer that adds up the processor seconds it takes as `seconds`."""
    from llm_unlearn.memorization.observations import Observations

    class Timed(Observations):
        seconds = 0.0

    def timed(name: str) -> Any:
        original = getattr(Observations, name)

        def call(self: Any, *arguments: Any) -> Any:
            start = time.process_time()
            told = original(self, *arguments)
            Timed.seconds += time.process_time() - start
            return told

        return call

    for name in ("observe_logits", "observe_tokens", "collect"):
        setattr(Timed, name, timed(name))
    return Timed


def timed_training(setting: Setting, output: Path, is_tracked: bool, **more: Any) -> Seconds:
    """One fine-tuning."""
    import shutil

    from llm_unlearn.approximate.fine_tuning import Learning
    from llm_unlearn.approximate.unlearn import prepare, train
    from llm_unlearn.exact.base_model import load_base

    model, tokenizer = load_base(setting.base)
    config = config_of(setting, output, **more)
    session, _ = prepare(model, tokenizer, setting.records, (), config, Learning(), lora())
    observer = timed_observer()() if is_tracked else None
    start = time.process_time()
    train(session, Learning(), None, None, observer)
    if observer is not None:
        observer.collect()
    seconds = time.process_time() - start
    shutil.rmtree(output)
    return Seconds(seconds, observer.seconds if observer else 0.0)


def timed_node(setting: Setting, is_tracked: bool) -> Seconds:
    """An exact run: S3T's two nodes of a shard, with TRL's fused head."""
    import tempfile

    from trl import ModelConfig

    from llm_unlearn.exact.arguments import S3TConfig
    from llm_unlearn.exact.base_model import load_base
    from llm_unlearn.exact.run import S3TRun

    model, tokenizer = load_base(setting.base)
    shape = ModelConfig(model_name_or_path=setting.base, lora_r=16, lora_alpha=32, lora_dropout=0.0)
    arguments = S3TConfig(
        exact_method="s3t", num_slices=2, num_sequences=1, max_steps=20, max_length=256, num_threads=1,
        per_device_train_batch_size=24, learning_rate=setting.flags["learning_rate"], use_cpu=True, bf16=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run"
        run = S3TRun.create(path, setting.records, arguments, model, tokenizer, shape)
        observer = timed_observer() if is_tracked else None
        start = time.process_time()
        run.train(model, tokenizer, track=observer)
        seconds = time.process_time() - start
        return Seconds(seconds, observer.seconds if observer else 0.0)


def measure_cost(setting: Setting, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Processor seconds with and without tracking, in turns: the least disturbed of each, the median
    ratio of neighbours, and the part of the tracked trainings that was spent in the tracker itself.
    """
    loops = {
        "recipes/unlearn.py's trainer": lambda tracked: timed_training(
            setting, arguments.output_dir / "timed", tracked, num_train_epochs=3
        ),
        "recipes/s3t.py's trainer": lambda tracked: timed_node(setting, tracked),
    }
    found = {}
    for name, loop in loops.items():
        loop(False)  # what is compiled and cached in the first
        pairs = [(loop(False), loop(True)) for _ in range(arguments.repeats)]
        plain, tracked = (min(one.whole for one in side) for side in zip(*pairs, strict=True))
        found[name] = {
            "plain": plain,
            "tracked": tracked,
            "ratio": tracked / plain,
            "median": statistics.median(after.whole / before.whole for before, after in pairs),
            "share": statistics.median(one.tracking / one.whole for _, one in pairs),
        }
    return found


def tracked_model(setting: Setting, place: Path) -> Any:
    """The model whose records are scored, with what its training showed; made once."""
    from llm_unlearn.approximate.fine_tuning import fine_tune
    from llm_unlearn.exact.base_model import load_base
    from llm_unlearn.memorization.observations import Observations
    from llm_unlearn.memorizing.scoring import keep_observations
    from llm_unlearn.memorizing.targets import open_target

    if not (place / "memorization" / "training.parquet").exists():
        model, tokenizer = load_base(setting.base)
        config, observer = config_of(setting, place), Observations()
        fine_tune(model, tokenizer, setting.records, config, lora(), observer=observer)
        keep_observations(place, setting.records, observer, model, config)
    target = open_target(place, setting.records)
    target.max_length, target.learning_rate = (
        setting.flags["max_length"],
        setting.flags["learning_rate"],
    )
    return target


def measure_scores(setting: Setting, arguments: argparse.Namespace) -> Any:
    """Every score with its seconds, and the reference."""
    from llm_unlearn.exact.base_model import load_base
    from llm_unlearn.memorization.counterfactual import Subsampling
    from llm_unlearn.memorizing.counterfactuals import measure_counterfactual
    from llm_unlearn.memorizing.findings import findings_of
    from llm_unlearn.memorizing.scoring import observed, score

    place = arguments.output_dir / setting.name
    target = tracked_model(setting, place)
    base, tokenizer = load_base(setting.base)
    config = config_of(setting, place / "unused", seed=1)
    measure_counterfactual(
        target, base, tokenizer, config, lora(), Subsampling(arguments.runs),
        lambda done, total: print(f"reference: {done} of {total} runs", flush=True),
    )  # fmt: skip
    seconds, times = {}, place / "seconds.json"
    if times.exists():
        seconds = json.loads(times.read_bytes())
    for name in AFTERWARDS:
        if name not in seconds:
            start = time.monotonic()
            score(target, [name], setting.holdout)
            seconds[name] = time.monotonic() - start
            times.write_text(json.dumps(seconds))
    scored = score(target, [*observed(target), *AFTERWARDS], setting.holdout)
    return findings_of(target, scored), seconds


def main() -> None:
    import torch

    from llm_unlearn.scoring import quiet

    arguments = read_arguments()
    if arguments.tofu is not None and arguments.base is None:
        raise SystemExit("--tofu needs --base: make one with benchmarks/tofu_base.py")
    torch.set_num_threads(1)
    quiet()
    setting = make_setting(arguments)
    cost = measure_cost(setting, arguments) if arguments.repeats else {}
    found, seconds = measure_scores(setting, arguments)
    if arguments.json:
        print(json.dumps({"cost": cost, "seconds": seconds, **found.to_dict(0)}, indent=1))
        return
    print_table(
        f"Tracking {len(setting.records)} records, processor seconds of a training",
        ("", "without", "with", "ratio", "median of ratios", "in the tracker"),
        [(name, f"{one['plain']:.2f}", f"{one['tracked']:.2f}",
          *(f"{one[key]:.3f}" for key in ("ratio", "median")), f"{one['share']:.1%}")
         for name, one in cost.items()],
    )  # fmt: skip
    reference = found.reference
    told = f"{setting.name}: {len(setting.records)} records, {reference.runs} runs, reliability "
    print_table(
        told + f"{reference.reliability:.2f}",
        ("score", "Spearman", "95 %", "controlled", "with length", "flat", "seconds"),
        [row_of(line, seconds, reference.seconds) for line in found.lines],
    )
    memorized = reference.memorization[~np.isnan(reference.memorization)]
    low, middle, high = np.quantile(memorized, [0.1, 0.5, 0.9])
    print(f"reference: 10 % below {low:.2f}, median {middle:.2f}, 10 % above {high:.2f}")


def row_of(line: Any, seconds: dict[str, float], of_reference: float) -> tuple[str, ...]:
    length = "–" if np.isnan(line.length) else f"{line.length:.2f}"
    if line.agreement is None:
        return (line.name, "", "", "", length, "", f"{of_reference:.0f}")
    rho, lower, upper, _ = line.agreement
    cost = f"{seconds[line.name]:.1f}" if line.name in seconds else "tracked"
    flat = "flat" if line.flat else ""
    return (line.name, f"{rho:.2f}", f"{lower:.2f} to {upper:.2f}", f"{line.controlled:.2f}",
            length, flat, cost)  # fmt: skip


if __name__ == "__main__":
    main()
