"""A store of a thousand experts, one for each subject: index, loading, answering, deleting.

    python benchmarks/many_experts.py [--subjects 1000] [--capacity 8]

The experts are random LoRAs of the right shape on the demonstration's base model (what they know is measured by
recipes/exact_study.py); everything else is real: records, nodes, ledger, index, served adapters. Every figure stands
beside a baseline of the same run.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from trl import ModelConfig

from llm_unlearn import scoring
from llm_unlearn.data import world
from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.data.records import make_records
from llm_unlearn.demonstration import MODEL_PATH
from llm_unlearn.evaluation.scorer import tokenize_open
from llm_unlearn.exact.adapters import WEIGHTS_NAME, expected_shapes
from llm_unlearn.exact.arguments import S3TConfig, make_config, make_shape
from llm_unlearn.exact.base_model import load_base
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.served import serve
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.exact.training import index_of


@contextmanager
def timed(what: str, units: int = 1, unit: str = "s") -> Iterator[None]:
    began = time.perf_counter()
    yield
    spent = (time.perf_counter() - began) / units
    print(
        f"{what}: {1000 * spent:.2f} ms" if unit == "ms" else f"{what}: {spent:.2f} s", flush=True
    )


def make_run(folder: str, subjects: int) -> S3TRun:
    model, tokenizer = load_base(str(MODEL_PATH))
    model_arguments = ModelConfig(model_name_or_path=str(MODEL_PATH), lora_r=8, lora_alpha=16)
    config = make_config(
        S3TConfig(exact_method="experts", num_shards=0, num_threads=1, use_cpu=True),
        model_arguments,
    )
    people = world.private_people(subjects)
    records = make_records(world.records(people), subject_column="subject")
    shape = make_shape(model, tokenizer, model_arguments)
    with timed(f"{subjects} subjects placed and written"):
        key = PartitionKey.from_phrase("many experts")
        run = S3TRun(RunDirectory.create(Path(folder, "run"), records, config, shape, key))
    directory = run.directory
    generator = np.random.default_rng(0)
    with timed("experts published with their indexes", subjects, "ms"):
        for node in directory.wanted().values():
            tensors = {
                name: (0.01 * generator.standard_normal(size)).astype(np.float32)
                for name, size in expected_shapes(node, directory.shape).items()
            }
            directory.nodes.publish(
                node, tensors, {"identity": directory.identity}, index_of(directory, node)
            )
    with timed("served for the first time"):
        serve(directory)
    return run


def ask(model, tokenizer, prompts: list[str]) -> None:
    for prompt in prompts:
        ids = torch.tensor([tokenize_open(tokenizer, prompt)])
        model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)


def seconds_each(work: Callable[[], None], units: int) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) / units


def time_answers(ensemble: ShardEnsemble, tokenizer, subjects: int) -> None:
    """One prompt at a time: by the base, by an expert in memory, and by experts that have to be loaded."""
    people = world.private_people(subjects)
    one = [row["prompt"] for row in world.questions(people[:1])] * 4
    spread = [row["prompt"] for row in world.questions(people[:24])][::6]
    base, _ = load_base(str(MODEL_PATH))
    assert ensemble.library is not None
    shard = next(iter(ensemble.library.directories.values()))
    alone = PeftModel.from_pretrained(load_base(str(MODEL_PATH))[0], str(shard)).eval()
    for model in (base, alone, ensemble):
        ask(model, tokenizer, one)  # the first time pays for whatever happens only once
    by_base, by_one, warm = (
        seconds_each(functools.partial(ask, model, tokenizer, one), len(one))
        for model in (base, alone, ensemble)
    )
    cold = seconds_each(lambda: ask(ensemble, tokenizer, spread), len(spread))
    print(
        f"an answer of 8 tokens by one adapter alone: {1000 * by_one:.1f} ms, {by_one / by_base:.2f} times the base "
        f"model's; by an expert in memory {warm / by_one:.2f} times that, by one that has to be loaded "
        f"{cold / by_one:.2f} times"
    )


def time_index_and_loading(ensemble: ShardEnsemble, subjects: int, capacity: int) -> None:
    assert ensemble.words is not None and ensemble.library is not None
    people = world.private_people(subjects)
    asked = [row["prompt"] for row in world.questions(people[:: max(1, len(people) // 100)])]
    with timed("index asked", len(asked), "ms"):
        leads = [ensemble.words.evidence(prompt).lead for prompt in asked]
    print(
        f"{np.mean(np.array(leads) > ensemble.rule.lead):.0%} of the questions are decided unread"
    )
    names = list(ensemble.library.directories)[capacity:][: 3 * capacity]
    with timed("an adapter loaded in the place of another", len(names), "ms"):
        for name in names:
            ensemble.library.require([name])


def time_deletions(run: S3TRun, folder: str, victims: list[str]) -> None:
    run.delete(victims[:1])
    with timed("a deletion", len(victims) - 1, "ms"):
        for victim in victims[1:]:
            run.delete([victim])
    with timed("all records read and placed again (what deleting without a store costs)"):
        slices = run.directory.slices
        records = [record for name in slices.names for record in slices.read(name)]
        RunDirectory.create(
            Path(folder, "again"), records, run.directory.config, run.directory.shape
        )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=1000)
    parser.add_argument("--capacity", type=int, default=8)
    options = parser.parse_args(argv)
    scoring.quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(folder, options.subjects)
        served, rule = run.directory.served, run.directory.config.rule
        weights = [path.stat().st_size for path in served.resolve().rglob(WEIGHTS_NAME)]
        words = [path.stat().st_size for path in served.resolve().rglob("words-*")]
        print(f"bytes a unit: {np.mean(weights):.0f} of weights, {np.mean(words):.0f} of index")
        model, tokenizer = load_base(str(MODEL_PATH))
        with timed(f"ensemble opened, {options.capacity} adapters loaded, index of all built"):
            ensemble = ShardEnsemble.from_run(model, served, rule, tokenizer, options.capacity)
        time_index_and_loading(ensemble, options.subjects, options.capacity)
        time_answers(ensemble, tokenizer, options.subjects)
        people = world.private_people(options.subjects)
        time_deletions(run, folder, [person.name for person in people[:5]])


if __name__ == "__main__":
    main(sys.argv[1:])
