"""Builders that the tests share: tiny models of several families, tokenizers, records, runs."""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)
from trl import ModelConfig

from llm_unlearn.data.partition import PartitionKey
from llm_unlearn.data.records import Record, canonical, make_records
from llm_unlearn.exact import training
from llm_unlearn.exact.adapters import expected_shapes
from llm_unlearn.exact.arguments import S3TConfig, make_config, make_shape
from llm_unlearn.exact.config import ModelShape, RunConfig
from llm_unlearn.exact.encryption import KEY_FILE_NAME
from llm_unlearn.exact.keys import Keys
from llm_unlearn.exact.node_training import NodeTask
from llm_unlearn.exact.postgresql import Address
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.slices import Placement
from llm_unlearn.exact.store import RunDirectory

VOCABULARY = 384
CORPUS = [
    f"Question: what does person {i} eat? Answer: dish number {i * 7 % 13}." for i in range(40)
]

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}


@functools.cache
def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    )
    return tokenizer


def make_tiny_model(family: str = "llama", layers: int = 4, width: int = 32) -> PreTrainedModel:
    set_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_layer=layers,
                n_embd=width,
                n_head=4,
                n_positions=512,
                **tokens,
            )
        ).eval()
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY, "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 2 * width,
        "num_attention_heads": 4, "max_position_embeddings": 512, **tokens,
    }  # fmt: skip
    if family != "gpt_neox":
        options["num_key_value_heads"] = 2
    if family in ("gemma2", "qwen3"):
        options["head_dim"] = width // 4
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**options)).eval()
    # A random model's logits hardly differ: spread them, so that an equality is not an accident.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def make_rows(subjects: int = 12, rows: int = 2, prefix: str = "person") -> list[dict[str, str]]:
    return [
        {
            "subject": f"{prefix} {s}",
            "prompt": f"Question: what does {prefix} {s} eat on day {r}? Answer:",
            "completion": f" dish number {(s * 7 + r * 3) % 13} and {s}{r}",
        }
        for s in range(subjects)
        for r in range(rows)
    ]


def tiny_records(subjects: int = 12, rows: int = 2) -> list[Record]:
    return make_records(make_rows(subjects, rows), subject_column="subject")


def core_records(subjects: int = 3) -> list[Record]:
    """The permanent core: some of nobody else, and one of a deletable subject."""
    rows = [*make_rows(subjects, 1, "resident"), {**make_rows()[-1], "prompt": "Day 9:"}]
    return make_records(rows, subject_column="subject")


def tiny_arguments(**options: Any) -> S3TConfig:
    """Two steps a node: enough for every bit to move."""
    defaults: dict[str, Any] = {
        "exact_method": "s3t", "num_shards": 1, "num_slices": 3, "num_sequences": 2, "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "max_length": 64, "use_cpu": True, "bf16": False,
    }  # fmt: skip
    if options.get("blocks") == "whole":
        defaults |= {"exact_method": "sisa", "num_sequences": 1}
    return S3TConfig(**{**defaults, **options})


def tiny_model_arguments(base: Path, **options: Any) -> ModelConfig:
    defaults: dict[str, Any] = {"lora_r": 6, "lora_alpha": 12, "lora_dropout": 0.1}
    return ModelConfig(model_name_or_path=str(base), **{**defaults, **options})


def load_tiny(base: Path) -> tuple[PreTrainedModel, Any]:
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(base)


def placed_by_id(shards: int, copies: int) -> Placement:
    """A placement that needs no model: `copies` neighbouring shards, told by the record's id."""

    def shards_of(record: Record) -> list[int]:
        return [(int(record.id[:8], 16) + copy) % shards for copy in range(copies)]

    return Placement(shards_of, Keys(np.eye(shards, 32, dtype=np.float32), copies).to_bytes())


def placed(config: RunConfig, placement: Placement | None) -> RunConfig:
    """The configuration of a run whose records public keys place."""
    if placement is None:
        return config
    return replace(config, keys=hashlib.sha256(placement.keys).hexdigest())


def key_store_of(options: dict[str, Any]) -> str | None:
    """Where the flags say that the keys are; None without encryption."""
    return options.get("key_store", KEY_FILE_NAME) if options.get("encrypt") else None


def make_run(
    path: Path,
    base: Path,
    records: list[Record] | None = None,
    key: str = "tests",
    train: bool = True,
    lora: dict[str, Any] | None = None,
    core: Sequence[Record] = (),
    placement: Placement | None = None,
    **options: Any,
) -> S3TRun:
    """A run with a fixed partition key, trained unless told otherwise."""
    model, tokenizer = load_tiny(base)
    model_arguments = tiny_model_arguments(base, **(lora or {}))
    run = S3TRun(
        RunDirectory.create(
            path,
            records if records is not None else tiny_records(),
            placed(make_config(tiny_arguments(**options), model_arguments), placement),
            make_shape(model, tokenizer, model_arguments),
            PartitionKey.from_phrase(key),
            core=core,
            placement=placement,
            key_store=key_store_of(options),
        )
    )
    if train:
        run.train(model, tokenizer)
    return run


def node_bytes(run: S3TRun) -> dict[str, bytes]:
    """What is in every file of every node, by its path below `nodes/`."""
    root, read = run.path / "nodes", run.directory.at_rest.read
    return {str(p.relative_to(root)): read(p) for p in sorted(root.rglob("*")) if p.is_file()}


def served_bytes(run: S3TRun) -> dict[str, bytes]:
    root = run.directory.served.resolve()
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


def stub_train_node(
    base: Any, tokenizer: Any, task: NodeTask, run: Any, shape: Any, *_: Any
) -> dict[str, Any]:
    """Stands in for training where thousands of nodes are wanted: a block made of a digest of
    everything that real training is given, so that any leak into the inputs shows in the bytes."""
    told = [
        task.node.to_dict(),
        [list(example) for example in task.examples],
        [p.to_dict() for p in task.parents],
    ]
    state = hashlib.sha256(canonical(told))
    for part in [*task.parts, *([task.start] if task.start else [])]:
        for name, tensor in sorted(part.items()):
            state.update(name.encode() + tensor.tobytes())
    generator = np.random.default_rng(int.from_bytes(state.digest(), "big"))
    return {
        name: generator.standard_normal(size).astype(np.float32)
        for name, size in expected_shapes(task.node, shape).items()
    }


class StubBase:
    """What training asks of a base model when nothing is computed."""

    device = torch.device("cpu")


@functools.cache
def tiny_shape() -> ModelShape:
    model = make_tiny_model()
    return make_shape(model, make_tiny_tokenizer(), ModelConfig(model_name_or_path="tiny"))


def make_stub_run(
    path: Path,
    records: list[Record],
    core: Sequence[Record] = (),
    placement: Placement | None = None,
    ledger: Address | None = None,
    **options: Any,
) -> S3TRun:
    """A run for `stub_train_node`: same records, trie, ledger and files, no training."""
    arguments = tiny_arguments(prefix_cache=False, **options)
    config = make_config(arguments, ModelConfig(lora_r=6, lora_alpha=12))
    key = PartitionKey.from_phrase("stub")
    config = placed(config, placement)
    return S3TRun(
        RunDirectory.create(
            path,
            records,
            config,
            tiny_shape(),
            key,
            core=core,
            placement=placement,
            ledger=ledger,
            key_store=key_store_of(options),
        )
    )


def train_stub(run: S3TRun) -> None:
    """`run.train` with `stub_train_node` in place; call it under `stubbed_training`."""
    run.train(StubBase(), make_tiny_tokenizer())  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def stubbed_training() -> Iterator[None]:
    original = training.train_node
    training.train_node = stub_train_node  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        training.train_node = original


def make_trained_stub(path: Path, **options: Any) -> Path:
    """A run of `tiny_records`, trained with `stub_train_node`: where it is, to be copied."""
    with stubbed_training():
        train_stub(make_stub_run(path, tiny_records(), **options))
    return path
