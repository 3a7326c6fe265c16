"""The harness against a loop over single rows, as MUSE's released code has it.

    python benchmarks/evaluation.py [--model RUN_OR_MODEL]

Both put the demonstration suite under the `muse` profile to the same model and must find the same
numbers: the loop asks every question for itself and scores every text for itself, in batches of one.
Prints seconds and their ratio.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch

from llm_unlearn import scoring
from llm_unlearn.demonstration import MODEL_PATH
from llm_unlearn.evaluation.harness import Options, evaluate_suite
from llm_unlearn.evaluation.prompts import Prompting
from llm_unlearn.evaluation.suites.demonstration import demonstration_muse
from llm_unlearn.evaluation.suites.suite import Suite
from llm_unlearn.evaluation.text import cut, rouge
from llm_unlearn.models import load_model

STOPS = ("\n\n", "\nQuestion", "Question:")


@torch.no_grad()
def continue_one(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def min_k(model: Any, tokenizer: Any, text: str, share: float = 0.4) -> float:
    ids = tokenizer(text, return_tensors="pt").input_ids
    logits = model(input_ids=ids).logits[0, :-1]
    log_p = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None]).squeeze(-1)
    lowest = torch.sort(log_p).values[: int(share * len(log_p))]
    return float(lowest.mean())


def loop(model: Any, tokenizer: Any, suite: Suite) -> dict[str, list[float]]:
    """Verbatim and knowledge memorization and Min-40%, one row at a time."""
    prompting = Prompting(suite.template)
    found: dict[str, list[float]] = {"forget_verbmem": []}
    for row in suite.sections["verbmem/forget"].rows:
        reference = tokenizer.decode(tokenizer(row["gt"]).input_ids[:128], skip_special_tokens=True)
        said = continue_one(model, tokenizer, row["prompt"], 128)
        found["forget_verbmem"].append(100 * rouge(said, reference).rougeL_f1)
    for name, section in (("forget_knowmem", "forget_qa"), ("retain_knowmem", "retain_qa")):
        found[name] = []
        for row in suite.sections[f"knowmem/{section}"].rows:
            prompt = prompting.stem(row["question"], ()) + " "
            said = cut(continue_one(model, tokenizer, prompt, 32), STOPS)
            found[name].append(100 * rouge(said, row["answer"]).rougeL_f1)
    for split in ("forget", "holdout"):
        rows = suite.sections[f"privleak/{split}"].rows
        found[split] = [min_k(model, tokenizer, row["text"]) for row in rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL_PATH))
    model_name = parser.parse_args().model
    scoring.quiet()
    loaded = load_model(model_name)
    whole = demonstration_muse()
    asked = (
        "verbmem/forget", "knowmem/forget_qa", "knowmem/retain_qa", "privleak/forget", "privleak/holdout",
    )  # fmt: skip
    suite = Suite(
        whole.name, {name: whole.sections[name] for name in asked}, whole.metrics, whole.probes,
        whole.utility, whole.template,
    )  # fmt: skip
    loaded.model(input_ids=torch.tensor([[1, 2, 3]]))  # neither pays for the first call
    start = time.perf_counter()
    expected = loop(loaded.model, loaded.tokenizer, suite)
    slow = time.perf_counter() - start
    start = time.perf_counter()
    results = evaluate_suite(loaded.model, loaded.tokenizer, suite, options=Options("muse"))
    fast = time.perf_counter() - start
    records = results.model.records
    for name, values in expected.items():
        metric = whole.metrics.get(name)
        section, column = (
            metric.column if metric and metric.column else (f"privleak/{name}", "min_k")
        )
        scale = 100 if metric else 1
        gap = float(np.abs(scale * records[section][column] - np.array(values)).max())
        print(f"{name}: {len(values)} rows, largest difference {gap:.1e}")
    print(
        f"one row at a time {slow:.1f} s, the harness {fast:.1f} s: {slow / fast:.1f} times as fast"
    )


if __name__ == "__main__":
    main()
