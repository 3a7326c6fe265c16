"""Train LoRA slices on a language model, so that a deletion is exact.

    accelerate launch recipes/s3t.py
        The embedded demonstration: train on invented people, delete one, ask before and after.

    accelerate launch recipes/s3t.py --model_name_or_path Qwen/Qwen3-0.6B \\
        --dataset_path records.jsonl --subject_column user --output_dir runs/mine
        Your model and records (JSON, JSON lines, CSV, Parquet, or --dataset_name on the Hub) with
        the columns text | prompt, completion | question, answer | messages.

What a run is made of:
    --exact_method experts  one LoRA for each subject (or shard) that depends on nothing else
                   s3t      blocks on top of each other (the S3T paper)
                   sisa     one LoRA for each shard, slice after slice, with checkpoints
                   lego     each record in the shards whose public keys it resembles
    --aggregate select|mixture|average|vote|merge   who answers: those that the prompt is for, or
                            all shards (experts: select; lego: nearest; else average)
    --num_shards m          members of the ensemble (s3t: 1), or experts (0: one for each subject)
    --num_slices L          slices of a shard, the granularity of deletion (s3t: 4)
    --num_sequences B       orders in which each shard is trained (s3t: 2)
    --blocks ranks|layers   what a stage owns: a band of ranks in every layer, or, as in the S3T
                            paper, a group of layers from the top (ranks; sisa: the whole adapter)
    --slice_data cumulative|disjoint   what a stage sees: all slices so far, or its own (cumulative)
    --subject_column C      who can ask for deletion (default: every record for itself)
    --rows_per_subject N    consecutive rows that share a subject (TOFU: 20)
    --core_path FILE        records to train under all others; they can NEVER be deleted
    --ledger_url URL        keep the ledger on a PostgreSQL server (a SQLite file in the run)
    --encrypt [--key_store PATH | vault+https://HOST/MOUNT/PATH]   records, nodes and caches encrypted on
                            disk, each under a key that a deletion destroys
    --track_memorization    keep what training shows of each record: llm-unlearn memorization RUN
    --push_to_hub, --hub_model_id REPO_ID    publish what is served, with card and certificates
                            (--hub_base_model: the base model's name there, if it is a directory here)
    --output_dir RUN        the run directory; a run that is there is resumed or rebuilt
    --config FILE.yaml      any of the flags from a file; the command line wins
and every training flag of TRL's SFT (--learning_rate, --max_steps, ...) and LoRA (--lora_r, ...), which
hold for each node: --help_all lists them. Afterwards: llm-unlearn status|delete|rebuild|verify RUN.
"""

import sys
from pathlib import Path

from llm_unlearn.console import print_table, run_and_exit, training_progress, warn
from llm_unlearn.errors import UserError
from llm_unlearn.launch import (
    check_processes,
    expand_help,
    parse_flags,
    publish_result,
    wants_short_help,
)


def main(argv: list[str]) -> None:
    if wants_short_help(argv):
        print(__doc__)
        return
    from accelerate import PartialState
    from transformers.utils import logging
    from trl import ModelConfig, TrlParser

    from llm_unlearn import demonstration
    from llm_unlearn.data.sources import DataArguments, load_core, load_records
    from llm_unlearn.exact.arguments import S3TConfig, make_config
    from llm_unlearn.exact.base_model import load_base
    from llm_unlearn.exact.run import S3TRun
    from llm_unlearn.hub.publishing import check_flags

    parser = TrlParser([DataArguments, S3TConfig, ModelConfig])
    data, arguments, model_arguments = parse_flags(parser, expand_help(argv))
    if data.is_demonstration:
        everything = [*demonstration.FLAGS[arguments.exact_method], *argv]
        data, arguments, model_arguments = parse_flags(parser, expand_help(everything))
    model_arguments.model_name_or_path = model_arguments.model_name_or_path or str(
        demonstration.MODEL_PATH
    )

    state = PartialState()
    check_processes(state.num_processes)
    # Whatever can be wrong with flags and data is found before a large model is loaded. A run that
    # is there keeps its own records, so the data is not read again.
    config = make_config(arguments, model_arguments)
    if config.num_shards == 0 and not data.names_subjects:
        raise UserError(
            "every record is a subject of its own and would get an adapter of its own: say who can ask "
            "for deletion with --subject_column or --rows_per_subject, or give --num_shards"
        )
    check_flags(arguments, model_arguments.model_name_or_path)
    is_new = not Path(arguments.output_dir, "run.json").exists()
    is_read = is_new and state.is_main_process
    records, core = (load_records(data), load_core(data)) if is_read else ([], [])
    if data.is_demonstration:
        logging.disable_progress_bar()
    model, tokenizer = load_base(
        model_arguments.model_name_or_path, model_arguments.model_revision, config.model
    )
    with state.main_process_first():
        run = S3TRun.create(
            arguments.output_dir, records, arguments, model, tokenizer, model_arguments, data.source,
            public_texts(arguments.public_path, data.is_demonstration), core,
        )  # fmt: skip
    if state.is_main_process:
        for line in run.warnings():
            warn(line)
    with training_progress(enabled=state.is_main_process) as progress:
        report = run.train(model, tokenizer, progress, tracker(arguments.track_memorization))
    if not state.is_main_process:
        return
    print(
        f"{run.path}: {report.trained} nodes trained in {report.seconds:.0f} s, {report.reused} were there"
    )
    show_result(run, model, tokenizer, data.is_demonstration)
    if arguments.push_to_hub:
        publish_result(arguments, run.path)


def tracker(is_asked: bool):
    """What watches each node in training, if it is asked for."""
    from llm_unlearn.memorization.observations import Observations

    return Observations if is_asked else None


def share(value: float) -> str:
    """A percentage; a dash where there is nobody."""
    return f"{value:.0%}" if value == value else "–"


def public_texts(path: str | None, is_demonstration: bool) -> list[str]:
    """What the keys of LegoNet are made of."""
    from llm_unlearn import demonstration
    from llm_unlearn.data.records import make_records
    from llm_unlearn.data.sources import read_rows
    from llm_unlearn.exact.keys import asked_by

    if path is not None:
        return [asked_by(record) for record in make_records(read_rows(path))]
    return demonstration.public_texts() if is_demonstration else []


def show_result(run, model, tokenizer, is_demonstration: bool) -> None:
    if not is_demonstration:
        print(f"served: {run.directory.served}/shard-*   next: llm-unlearn status {run.path}")
        return
    from llm_unlearn.demonstration import demonstrate

    shown = demonstrate(run, model, tokenizer)
    print_table(
        f"Facts answered right before and after the deletion of {shown.subject}",
        ("", "the deleted", "its slice", "other slices", "public people"),
        [
            (moment, *(share(part) for part in (k.deleted, k.same_slice, k.others, k.public)))
            for moment, k in shown.knowledge.items()
        ],
    )
    print(
        "(public people are in the base model's own data: what training costs it shows there)\n"
        f"the deletion took {shown.deletion.seconds:.2f} s; retraining everything would have cost "
        f"{shown.retraining_seconds:.0f} s\ncertificate: {shown.deletion.certificate}\n"
        f"try: llm-unlearn verify {run.path}    llm-unlearn rebuild {run.path}    "
        f"llm-unlearn status {run.path}"
    )


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
