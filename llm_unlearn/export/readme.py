"""The README.md of an export: what it is, and the lines that load it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from llm_unlearn.exact.copies import Copy
from llm_unlearn.exact.store import RunDirectory

MOST_SHOWN = 16  # adapters that are named one by one

STALE = """
This is copy `{id}` of the run. `lineage.json` names the nodes that it is made of and the digests of its files. When
something is deleted that it depends on, `llm-unlearn copies RUN` calls it stale: then load a new export, delete this
one (`llm-unlearn copies RUN --delete {id}`) and everything made from it, and register what you make from it
(`llm-unlearn copies RUN --add PLACE --kind quantised --parent {id}`) so that it is listed too.
"""

VLLM = """# Adapters for vLLM

```bash
{serve}
```

One directory is the adapter of one shard; its name has the digest of its content, so that no other adapter ever has
the same name. That matters: vLLM keeps what it computed for a prompt under the name of the adapter, and an adapter
loaded again under an old name can answer with it. {modules}

{answers}

At run time, with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True` in the server's environment (only where you trust everybody
who can reach it):

```bash
curl -X POST localhost:8000/v1/load_lora_adapter -H "Content-Type: application/json" \\
    -d '{load}'
curl -X POST localhost:8000/v1/unload_lora_adapter -H "Content-Type: application/json" \\
    -d '{unload}'
```

**Unloading forgets the name. The weights stay in the server's memory until others take their place** (vLLM issue
54839): where a deletion must be certain, restart the server with the new adapters.

vLLM computes in the type of the base model as it loads it; these files are float32. All have one rank and one scale:
modules of a lower rank are filled up with zeros. This was checked against vLLM's source and not run.
"""

MERGED = """# Merged model

`AutoModelForCausalLM.from_pretrained({place!r})`, or `vllm serve {quoted}`. The base model with {what} added to its
weights, in {dtype}.

{answers}
"""

GGUF = """# Model for llama.cpp

```bash
python llama.cpp/convert_hf_to_gguf.py {quoted} --outfile model.gguf --outtype {outtype}
```
{lora}
The model is the base model with {what} added to its weights, in {dtype}; convert it with transformers {transformers} or
newer installed. llama.cpp has to know the architecture and the tokenizer of the base model; it was not run here.
A GGUF file, and each quantisation of it, is a copy of its own: register it as below.

{answers}
"""

LORA = """
Or the adapter alone, for a GGUF file of the unchanged base model:

```bash
python llama.cpp/convert_lora_to_gguf.py {adapter} --base {quoted} --outfile adapter.gguf --outtype f32
```
"""

NO_LORA = """
(The adapter alone has no GGUF form here: the converter turns this family's weights around, and adapters with them.)
"""

OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

ANSWERS = {
    "select": "The run finds the adapter that a prompt is for by its words, and asks the base model where there is "
    "none (`S3TRun.open(RUN).ensemble()`). {loaded} alone does not: who calls it decides.",
    "all": "The run lets all shards answer each prompt together ({rule}; `S3TRun.open(RUN).ensemble()`). {loaded} "
    "alone is one shard's answer.",
    "same": "It answers as the run does.",
}


def of_vllm(
    run: RunDirectory, copy: Copy, modules: Sequence[Mapping[str, str]], rank: int, is_whole: bool
) -> str:
    """Of a directory of adapters.

    Args:
        modules: `name` and `path` of each.
        rank: what `--max-lora-rank` has to be.
        is_whole: everything that is served is in it, as one.
    """
    told = "`lora_modules.json` lists them all."
    if len(modules) > MOST_SHOWN:
        told = (
            f"`lora_modules.json` lists all {len(modules)}; to load each when it is asked for, start the server with "
            f"`VLLM_PLUGINS=lora_filesystem_resolver VLLM_LORA_RESOLVER_CACHE_DIR={shlex.quote(copy.place)} "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True` and without `--lora-modules`."
        )
    text = VLLM.format(
        serve=_serve_command(run, modules[:MOST_SHOWN], rank),
        modules=told,
        answers=_answers(run, is_whole, "An adapter"),
        load=_body(lora_name=modules[0]["name"], lora_path=modules[0]["path"]),
        unload=_body(lora_name=modules[0]["name"]),
    )
    return text + STALE.format(id=copy.id)


def of_merged(run: RunDirectory, copy: Copy, what: str, dtype: str, is_whole: bool) -> str:
    """Of one model.

    Args:
        what: of which adapter.
    """
    text = MERGED.format(
        place=copy.place,
        quoted=shlex.quote(copy.place),
        what=what,
        dtype=dtype,
        answers=_answers(run, is_whole, "This model"),
    )
    return text + STALE.format(id=copy.id)


def of_gguf(
    run: RunDirectory, copy: Copy, what: str, dtype: str, is_whole: bool, adapter: str | None
) -> str:
    """Of what llama.cpp converts.

    Args:
        adapter: name of the directory of the adapter alone; None where it cannot be converted.
    """
    quoted = shlex.quote(copy.place)
    lora = LORA.format(adapter=shlex.quote(f"{copy.place}/{adapter}"), quoted=quoted)
    text = GGUF.format(
        quoted=quoted,
        outtype=OUTTYPES.get(dtype, "auto"),
        lora=lora if adapter else NO_LORA,
        what=what,
        dtype=dtype,
        transformers=version("transformers"),
        answers=_answers(run, is_whole, "This model"),
    )
    return text + STALE.format(id=copy.id)


def _answers(run: RunDirectory, is_whole: bool, loaded: str) -> str:
    """How its answers differ from the run's.

    Args:
        is_whole: everything that is served is in it, as one.
    """
    rule = run.config.rule
    if rule.routes_prompts:
        return ANSWERS["select"].format(loaded=loaded)
    return (
        ANSWERS["same"] if is_whole else ANSWERS["all"].format(rule=rule.aggregate, loaded=loaded)
    )


def _serve_command(run: RunDirectory, modules: Sequence[Mapping[str, str]], rank: int) -> str:
    """The line that starts a vLLM server."""
    base = shlex.quote(run.shape.name_or_path)
    revision = f" --revision {shlex.quote(run.shape.revision)}" if run.shape.revision else ""
    named = " \\\n        ".join(shlex.quote(f"{m['name']}={m['path']}") for m in modules)
    return f"vllm serve {base}{revision} --enable-lora --max-lora-rank {rank} \\\n    --lora-modules {named}"


def _body(**values: str) -> str:
    """JSON within single quotes of a shell."""
    return json.dumps(values).replace("'", "'\\''")
