"""Standard capabilities of a model, by lm-evaluation-harness (pip install 'llm-unlearn[lm-eval]').

    python eval/capabilities.py --model M --adapter A --tasks wmdp_bio wmdp_cyber mmlu --output_dir OUT
        WMDP (hazardous knowledge: after unlearning near the 0.25 of guessing) and MMLU (to stay high).

    python eval/capabilities.py --model llm_unlearn/data/demonstration \\
        --tasks world_public world_private --include_path eval/tasks --output_dir OUT
        Offline: what the demonstration's base model knows of public and of private people. The files in
        eval/tasks are also the pattern for your own: a task file that names local data.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_unlearn.console import print_table, run_and_exit

if TYPE_CHECKING:
    from llm_unlearn.evaluation.results import Value

SCHEMA = 1


def batch_size(text: str) -> int | str:
    return text if text.startswith("auto") else int(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub name of the model")
    add("--adapter", help="a PEFT adapter, or what a run serves, on top of it")
    add("--dtype", help="of the weights: float32, bfloat16, float16 (float32)")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="names of tasks or groups")
    add("--include_path", type=Path, metavar="DIR", help="folder of further task files")
    add("--output_dir", type=Path, required=True, help="capabilities.json is written there")
    add("--num_fewshot", type=int, help="solved examples before each question (the task's own)")
    add("--limit", type=int, help="rows of each task (all)")
    add("--batch_size", type=batch_size, default=16, help="a number or auto (16)")
    add("--apply_chat_template", action="store_true", help="ask as the tokenizer's chat does")
    add("--json", action="store_true", help="print what is written, for a program")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    from llm_unlearn.evaluation.capabilities import evaluate_capabilities
    from llm_unlearn.models import load_model

    loaded = load_model(arguments.model, arguments.adapter, dtype=arguments.dtype)
    values = evaluate_capabilities(
        loaded.model,
        loaded.tokenizer,
        arguments.tasks,
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        apply_chat_template=arguments.apply_chat_template,
    )
    text = write(arguments, loaded.label, values)
    if arguments.json:
        print(text)
    else:
        show(loaded.label, values)
        print(f"written: {arguments.output_dir / 'capabilities.json'}")


def write(arguments: argparse.Namespace, label: str, values: "dict[str, Value]") -> str:
    """Write `capabilities.json` and return its text; NaN is null."""
    import importlib.metadata
    import math
    from dataclasses import asdict

    from llm_unlearn import files

    def plain(value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    content = {
        "schema": SCHEMA,
        "model": label,
        "values": {
            name: {key: plain(item) for key, item in asdict(value).items()}
            for name, value in values.items()
        },
        "configuration": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(arguments).items()
            if name != "json"
        },
        "versions": {
            name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch")
        },
    }
    text = json.dumps(content, indent=1)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    files.write_bytes(arguments.output_dir / "capabilities.json", (text + "\n").encode())
    return text


def show(label: str, values: "dict[str, Value]") -> None:
    print_table(
        f"Capabilities of {label}",
        ("", "value", "95 % interval", "rows", ""),
        [
            (name, f"{v.value:.4g}", f"{v.lower:.4g} to {v.upper:.4g}", v.n, v.note)
            for name, v in values.items()
        ],
    )


if __name__ == "__main__":
    run_and_exit(lambda: main(sys.argv[1:]))
