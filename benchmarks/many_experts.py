"""A store of a thousand experts, one for each subject: index, loading, answering, deleting.

    python benchmarks/many_experts.py [--subjects 1000] [--capacity 8]

The experts are random LoRAs of the right shape on the demonstration's base model (what they know is measured by
recipes/exact_study.py); everything else is real: records, nodes, ledger, index, served adapters. Every figure stands
beside a baseline of the same run.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
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


def ask(ensemble: ShardEnsemble, tokenizer, prompts: list[str]) -> None:
    for prompt in prompts:
        ids = torch.tensor([tokenize_open(tokenizer, prompt)])
        ensemble.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)


def seconds_each(work: Callable[[], None], units: int) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) / units


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=1000)
    parser.add_argument("--capacity", type=int, default=8)
    options = parser.parse_args(argv)
    scoring.quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(folder, options.subjects)
        served = run.directory.served
        weights = [path.stat().st_size for path in served.resolve().rglob(WEIGHTS_NAME)]
        words = [path.stat().st_size for path in served.resolve().rglob("words-*")]
        print(f"bytes a unit: {np.mean(weights):.0f} of weights, {np.mean(words):.0f} of index")
        model, tokenizer = load_base(str(MODEL_PATH))
        with timed(f"ensemble opened, {options.capacity} adapters loaded, index of all built"):
            ensemble = ShardEnsemble.from_run(
                model, served, run.directory.config.rule, tokenizer, options.capacity
            )
        assert ensemble.words is not None and ensemble.library is not None
        people = world.private_people(options.subjects)
        asked = [row["prompt"] for row in world.questions(people[:: max(1, len(people) // 100)])]
        found = 0
        with timed("index asked", len(asked), "ms"):
            for prompt in asked:
                found += int(ensemble.words.evidence(prompt).lead > ensemble.rule.lead)
        print(f"{found / len(asked):.0%} of the questions are decided unread")
        names = ensemble.library.names
        cold = itertools.islice(itertools.cycle(names), options.capacity, 4 * options.capacity)
        with timed("an adapter loaded in the place of another", 3 * options.capacity, "ms"):
            for name in cold:
                ensemble.library.require([name])
        one = [row["prompt"] for row in world.questions(people[:1])] * 4
        ask(ensemble, tokenizer, one)
        warm = seconds_each(lambda: ask(ensemble, tokenizer, one), len(one))
        spread = [row["prompt"] for row in world.questions(people[:24])][::6]
        swapping = seconds_each(lambda: ask(ensemble, tokenizer, spread), len(spread))
        base, _ = load_base(str(MODEL_PATH))
        alone = seconds_each(lambda: ask_base(base, tokenizer, one), len(one))
        print(
            f"an answer of 8 tokens: {1000 * alone:.1f} ms by the base model, {warm / alone:.2f} times that by an "
            f"expert in memory, {swapping / alone:.2f} times by one that has to be loaded"
        )
        victims = [person.name for person in people[:5]]
        for victim in victims[:1]:
            run.delete([victim])
        with timed("a deletion", len(victims) - 1, "ms"):
            for victim in victims[1:]:
                run.delete([victim])
        with timed("all records read and placed again (what deleting without a store costs)"):
            records = [
                r for name in run.directory.slices.names for r in run.directory.slices.read(name)
            ]
            config, shape = run.directory.config, run.directory.shape
            RunDirectory.create(Path(folder, "again"), records, config, shape)


def ask_base(model, tokenizer, prompts: list[str]) -> None:
    for prompt in prompts:
        ids = torch.tensor([tokenize_open(tokenizer, prompt)])
        model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)


if __name__ == "__main__":
    main(sys.argv[1:])
