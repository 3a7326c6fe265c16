"""Who answers a prompt: every group of prompts of the demonstration under every rule.

    accelerate launch recipes/s3t.py --exact_method experts --output_dir runs/experts
    python benchmarks/selection.py --run runs/experts

Prints for each rule the share of prompts that the base model answers, and of facts answered right, and
what a prompt costs beside one adapter alone. Own people are those whose expert is served; orphans share
the expert of somebody who was deleted (or are that person); unseen people were never trained on.
"""

import argparse
import time

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from llm_unlearn import scoring
from llm_unlearn.data import world
from llm_unlearn.evaluation.scorer import Scorer, tokenize_open
from llm_unlearn.evaluation.text import is_exact, name_free
from llm_unlearn.exact.base_model import load_base_of
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.selection import BASE_MODEL, Rule
from llm_unlearn.exact.settling import depths_served

# Each with whether the words of a prompt choose who reads it, or everybody does.
RULES: dict[str, tuple[Rule, bool]] = {
    "average": (Rule("average"), False),
    "vote": (Rule("vote"), False),
    "merge": (Rule("merge"), False),
    "select, read by all": (Rule("select"), False),
    "select, read by all, floor -3.5": (Rule("select", floor=-3.5), False),
    "select": (Rule("select"), True),
    "select, floor -3.5": (Rule("select", floor=-3.5), True),
    "mixture": (Rule("mixture"), True),
}
NEW_TOKENS = 8


def ensemble_of(run: S3TRun, name: str) -> tuple[ShardEnsemble, PreTrainedTokenizerBase]:
    rule, uses_words = RULES[name]
    model, tokenizer = load_base_of(run.directory)
    served = run.directory.served
    return ShardEnsemble.from_run(model, served, rule, tokenizer if uses_words else None), tokenizer


def groups_of(run: S3TRun) -> dict[str, list[dict[str, str]]]:
    """Questions by whom they are about."""
    everybody = world.private_people(2 * world.PRIVATE_COUNT)
    trained, unseen = everybody[: world.PRIVATE_COUNT], everybody[world.PRIVATE_COUNT :]
    depths, place = depths_served(run.directory), run.directory.slices.place
    own = [person for person in trained if depths.get(place(person.name).shard)]
    named = world.questions(own)
    return {
        "own": named,
        "own, paraphrased": world.questions(own, paraphrased=True),
        "own, without names": [
            {**row, "prompt": name_free(row["prompt"], row["subject"])} for row in named
        ],
        "orphans": world.questions([person for person in trained if person not in own]),
        "unseen": world.questions(unseen),
        "public": world.questions(world.public_people()[: world.PRIVATE_COUNT]),
    }


def shares(model: ShardEnsemble, tokenizer, rows: list[dict[str, str]]) -> tuple[float, float]:
    """Answered by the base model, and answered right."""
    prompts = [tokenize_open(tokenizer, row["prompt"]) for row in rows]
    scorer = Scorer(model, tokenizer)
    said = [tokenizer.decode(found[0]) for found in scorer.generate(prompts, NEW_TOKENS)]
    right = np.mean([is_exact(s, row["answer"]) for s, row in zip(said, rows, strict=True)])
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    choices = model.choose(ids, mask)
    return float(np.mean([c[0].adapter == BASE_MODEL for c in choices])), float(right)


def seconds(model, tokenizer, rows: list[dict[str, str]]) -> float:
    prompts = [tokenize_open(tokenizer, row["prompt"]) for row in rows]
    scorer = Scorer(model, tokenizer)
    scorer.generate(prompts[:4], 2)
    start = time.perf_counter()
    scorer.generate(prompts, NEW_TOKENS)
    return (time.perf_counter() - start) / len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="experts trained on the demonstration")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    options = parser.parse_args()
    run = S3TRun.open(options.run)
    scoring.quiet()
    groups = groups_of(run)
    print("| rule | " + " | ".join(f"{name} ({len(rows)})" for name, rows in groups.items()) + " |")
    print("|---" * (len(groups) + 1) + "|")
    for name in options.rules:
        ensemble, tokenizer = ensemble_of(run, name)
        found = [shares(ensemble, tokenizer, rows) if rows else (0, 0) for rows in groups.values()]
        cells = [f"{right:.0%} right, {base:.0%} base" for base, right in found]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    model, tokenizer = load_base_of(run.directory)
    shard = next(f"shard-{s}" for s, depth in depths_served(run.directory).items() if depth)
    alone = PeftModel.from_pretrained(model, str(run.directory.served / shard)).eval()
    one = seconds(alone, tokenizer, groups["own"])
    for name in options.rules:
        ensemble, tokenizer = ensemble_of(run, name)
        spent = seconds(ensemble, tokenizer, groups["own"])
        print(f"{name}: {1000 * spent:.1f} ms a prompt, {spent / one:.1f} times one adapter alone")


if __name__ == "__main__":
    main()
