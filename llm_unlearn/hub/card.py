"""The card of a published run: what it is, what is guaranteed, how to load and to check it.

It tells numbers of records, subjects and requests; no name, no text, no path of this machine.
"""

from collections.abc import Sequence

from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.hub.content import CORE_EXCEPTION, GUARANTEE, OUT_OF_REACH, STATEMENT_NAME, Content
from llm_unlearn.hub.evaluations import Evaluated, to_model_index, to_table
from llm_unlearn.hub.snapshot import Member, Snapshot

MOST_ROWS = 64  # of the table of adapters

METHODS = {
    "experts": "an expert for each shard, trained on its own records and nothing else",
    "s3t": "blocks on top of frozen earlier ones, in several orders (S3T, arXiv 2406.16257)",
    "sisa": "one adapter a shard, continued slice after slice (SISA, arXiv 1912.03817)",
    "lego": "each record in the shards whose public keys it resembles (LegoNet, arXiv 2210.16023)",
}


def method_of(run: RunDirectory) -> str:
    """The exact method that a run's configuration is of."""
    config = run.config
    if config.keys is not None:
        return "lego"
    if config.blocks == "whole":
        return "sisa"
    return "experts" if config.num_slices * len(config.sequences) == 1 else "s3t"


def make_card(snapshot: Snapshot, content: Content, evaluations: Sequence[Evaluated] = ()) -> str:
    """Markdown with the Hub's metadata."""
    from huggingface_hub import ModelCardData

    method = method_of(snapshot.run)
    name = content.repository.rsplit("/", 1)[-1]
    metadata = ModelCardData(
        base_model=snapshot.base,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["unlearning", "exact-unlearning", method, "lora"],
        model_name=name,
        eval_results=to_model_index(evaluations) or None,
    )
    core = [f"{CORE_EXCEPTION.capitalize()}.", ""] if snapshot.run.core else []
    lines = [
        "---", metadata.to_yaml(), "---", "",
        f"# {name}", "",
        f"LoRA adapters for `{snapshot.base}` from which people's records can be deleted exactly: "
        f"{METHODS[method]}.", "",
        "## Guarantee", "",
        f"**{GUARANTEE[0].upper()}{GUARANTEE[1:]}.** It is dense retraining: what is here is, byte for "
        "byte, what training without the deleted records produces.", "",
        *core,
        *_data(snapshot),
        *_adapters(snapshot, content),
        *_loading(snapshot, content),
        *_verifying(content),
        "## Evaluation", "",
        *(to_table(evaluations) if evaluations else ["None was published."]), "",
        "## Out of reach", "",
        "When something is deleted, a new revision is published here and the earlier ones are purged and asked "
        "for. Nobody can reach:", "",
        *(f"* {line}" for line in OUT_OF_REACH),
        "* the pre-training data of the base model", "",
        "That something was deleted can be seen, and whoever kept an earlier adapter can compare.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _data(snapshot: Snapshot) -> list[str]:
    run = snapshot.run
    headers = [run.slices.header(name) for name in run.slices.names]
    records = sum(header.records for header in headers) // run.config.copies
    held = f"{records} records"
    if run.slices.is_keyed:
        held += f" of {sum(header.subjects for header in headers)} subjects"
    shape = f"{len(run.shards)} shards of {run.config.num_slices} slices"
    return [
        "## Data", "",
        f"{held}, in {shape}. Requests for deletion or correction that were carried out: "
        f"{len(snapshot.requests)}; each has its certificate in `certificates/`. "
        "Whom they are about is said by keyed pseudonyms alone.", "",
    ]  # fmt: skip


def _adapters(snapshot: Snapshot, content: Content) -> list[str]:
    shown = list(content.members.items())[:MOST_ROWS]
    more = len(content.members) - len(shown)
    depth = snapshot.run.config.num_slices
    lines = ["## Adapters", "", "| folder | what | blocks |", "|---|---|---|"]
    lines += [
        f"| `{folder or '.'}` | {member.name} | {_blocks(member, depth)} |"
        for folder, member in shown
    ]
    if more:
        lines += ["", f"and {more} more."]
    if not content.members:
        lines += ["", "Nothing is left: the base model answers alone."]
    if len(content.members) > 1:
        rule = snapshot.run.config.rule.aggregate
        lines += [
            "",
            f"In the run they answer as one model (`{rule}`). The indexes by which prompts find their "
            "adapter are useless without the run's key and are not published.",
        ]
    return [*lines, ""]


def _blocks(member: Member, depth: int) -> str:
    return "cannot be deleted" if member.name == "core" else f"{member.depth} of {depth}"


def _loading(snapshot: Snapshot, content: Content) -> list[str]:
    folders = [folder.rstrip("/") for folder in content.members if folder]
    more = f', subfolder="{folders[0]}"' if folders else ""
    return [
        "## Loading", "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM", "",
        f'base = AutoModelForCausalLM.from_pretrained("{snapshot.base}")',
        f'model = PeftModel.from_pretrained(base, "{content.repository}"{more})',
        "```", "",
    ]  # fmt: skip


def _verifying(content: Content) -> list[str]:
    return [
        "## Verifying", "",
        "```bash",
        f"llm-unlearn pull {content.repository} --key signing.pub   # a key that you trust",
        "```", "",
        f"`{STATEMENT_NAME}` is an in-toto statement in a DSSE envelope, signed with Ed25519: it names every "
        "file here by its SHA-256, the base model by the digest of its weights, the requests that were "
        "carried out, and what was purged from the Hub. `signing.pub` is only as good as this repository: "
        "compare it with one that reached you another way.", "",
    ]  # fmt: skip
