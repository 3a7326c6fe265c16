"""A small base model for TOFU on a CPU: pre-trained on the authors that `blocks.py` leaves alone.

    python benchmarks/tofu_base.py --tofu full.json --skip_authors 12 --output_dir tofu-base
    python benchmarks/blocks.py --tofu full.json --authors 12 --model tofu-base ...

It reads the questions and answers of every author but the first ones, so that those are private to
it, as they are to a real model. Its English is poor: what it is for is to compare designs.
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_unlearn.data.records import make_records
from llm_unlearn.data.sources import read_rows

ROWS_PER_AUTHOR = 20


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tofu", type=Path, required=True)
    parser.add_argument("--skip_authors", type=int, default=12)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args(argv)
    rows = read_rows(options.tofu)[ROWS_PER_AUTHOR * options.skip_authors :]
    texts = ["".join(record.texts()) for record in make_records(rows)]

    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(
        texts, 2048, show_progress=False, special_tokens=["<pad>", "<s>", "</s>"]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=options.output_dir, num_train_epochs=options.epochs, per_device_train_batch_size=32,
            learning_rate=2e-3, warmup_steps=0.05, lr_scheduler_type="cosine", weight_decay=0.01, use_cpu=True,
            save_strategy="no", logging_steps=50, train_sampling_strategy="group_by_length", seed=0,
        ),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
