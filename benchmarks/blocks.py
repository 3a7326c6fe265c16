"""What each kind of block and slice data costs, and what is remembered at every depth.

    python benchmarks/blocks.py                                   # the demonstration
    python benchmarks/blocks.py --tofu full.json --authors 16     # TOFU, 20 rows an author

One shard, one sequence, equal rank, learning rate and steps a node. A row of the table is a depth:
the blocks 1 to k, which is what a deletion in slice k+1 leaves. Scores are means over each of the
slices that the depth has seen: exact match for the demonstration; for TOFU the mean probability
of the answer's tokens, exp(-mean negative log-likelihood) (TOFU's "probability", section 2.2.2).
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftModel
from trl import ModelConfig

from llm_unlearn.console import print_table, training_progress
from llm_unlearn.data import world
from llm_unlearn.data.encoding import encode
from llm_unlearn.data.partition import PartitionKey, SliceName
from llm_unlearn.data.records import Record, make_records
from llm_unlearn.data.sources import read_rows
from llm_unlearn.demonstration import MODEL_PATH
from llm_unlearn.evaluation.scorer import answer
from llm_unlearn.evaluation.text import exact_match
from llm_unlearn.exact.arguments import S3TConfig, make_config, make_shape
from llm_unlearn.exact.base_model import load_base
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.served import write_shard
from llm_unlearn.exact.store import RunDirectory

DESIGNS = [(blocks, data) for blocks in ("ranks", "layers") for data in ("cumulative", "disjoint")]


def answer_probability(model, tokenizer, records: list[Record]) -> float:
    total = 0.0
    for record in records:
        example = encode(record, tokenizer, 512, completion_only=True)
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        with torch.no_grad():
            total += math.exp(-model(input_ids=ids, labels=labels).loss.item())
    return total / len(records)


def answers_right(model, tokenizer, records: list[Record]) -> float:
    said = answer(
        model, tokenizer, [record.content["prompt"] for record in records], max_new_tokens=8
    )
    return exact_match(said, [record.content["completion"] for record in records])


def measure(
    records: list[Record], score, blocks: str, data: str, options: argparse.Namespace
) -> list[list]:
    model, tokenizer = load_base(options.model)
    model_arguments = ModelConfig(
        model_name_or_path=options.model, lora_r=32, lora_alpha=64, lora_dropout=0.0
    )
    arguments = S3TConfig(
        exact_method="s3t", num_slices=4, num_sequences=1, blocks=blocks, slice_data=data, max_steps=options.steps,
        learning_rate=options.learning_rate, per_device_train_batch_size=options.batch, warmup_steps=5,
        lr_scheduler_type="cosine", max_length=512, num_threads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = S3TRun(
            RunDirectory.create(
                Path(folder, "run"),
                records,
                make_config(arguments, model_arguments),
                make_shape(model, tokenizer, model_arguments),
                PartitionKey.from_phrase("benchmark"),
            )
        )
        began = time.monotonic()
        with training_progress() as progress:
            run.train(model, tokenizer, progress)  # pyright: ignore[reportArgumentType]
        seconds = time.monotonic() - began
        path, rows = run.directory.paths(0)[0], []
        for depth in range(len(path) + 1):
            served = Path(folder, f"depth-{depth}")
            write_shard(run.directory, 0, path[:depth], served)
            adapted = PeftModel.from_pretrained(load_base(options.model)[0], str(served)).eval()
            scores = [
                score(adapted, tokenizer, run.directory.slices.read(SliceName(0, part)))
                for part in path[-1].path[: depth or None]
            ]
            shown = " ".join(f"{100 * value:.0f}" for value in scores)
            rows.append(
                [blocks, data, depth, shown, f"{seconds:.0f}" if depth == len(path) else ""]
            )
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tofu", type=Path, help="TOFU's full.json; the demonstration without it")
    parser.add_argument("--authors", type=int, default=16)
    parser.add_argument("--model", default=str(MODEL_PATH))
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of every node")
    parser.add_argument("--batch", type=int, default=72)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    options = parser.parse_args(argv)
    if options.tofu:
        records = make_records(read_rows(options.tofu)[: 20 * options.authors], rows_per_subject=20)
        score, what = answer_probability, f"TOFU, {options.authors} authors: answer probability (%)"
    else:
        records = make_records(world.records(world.private_people()), subject_column="subject")
        score, what = answers_right, "demonstration: exact match (%)"
    rows = [
        row for blocks, data in DESIGNS for row in measure(records, score, blocks, data, options)
    ]
    columns = (
        "blocks",
        "slice data",
        "depth",
        "score of each slice seen (depth 0: base, all slices)",
        "seconds",
    )
    print_table(f"{what}; {options.steps} steps a node", columns, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
