"""The commands, as a person and a machine see them, and what PEFT loads over HTTP."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_unlearn.hub import client
from llm_unlearn.hub.client import Hub
from tests.hub.published import BASE, NAME, World, make_trained, published
from tests.loopback_hub import TOKEN
from tests.saying import Say, in_json, one_line
from tests.test_cli import ROOT

START = Hub.__init__


@pytest.fixture
def world(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)
    with published(trained, tmp_path / "run") as made:
        talk_to(made.loop.url, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


def talk_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does for a process that starts."""
    monkeypatch.setattr(Hub, "__init__", functools.partialmethod(START, url))


def test_push_pull_and_purge(say: Say, world: World) -> None:
    code, out, error = say("push", world.run.path, NAME, "--base_model", BASE)
    assert (code, error) == (0, "")
    assert out == f"{NAME} is published: revision {world.head().oid[:8]}\n"
    old = world.weights()
    say("delete", world.run.path, "--subject", "person 3")
    code, out, _ = say("push", world.run.path, NAME, "--base-model", BASE)
    assert code == 0 and "all gone" in out
    assert f"{NAME} was squashed: asked for 3 revisions and 1 weight files" in out
    assert out.count("\n  - ") >= 4 and "refs of pull requests" in out
    assert not world.served() & (old - world.weights())
    code, out, error = say("pull", NAME)
    assert code == 0 and "1 requests were carried out" in out
    assert 'PeftModel.from_pretrained(base_model, "adapters/shard-0")   on org/tiny' in out
    assert "only as good as that" in error
    code, out, error = say("pull", NAME, "--key", world.run.path / "signing.pub")
    assert (code, error) == (0, "")
    code, out, _ = say("purge", world.run.path)
    assert code == 0 and "all gone" in out


def test_in_json(say: Say, world: World) -> None:
    options = ["--base_model", BASE, "--json"]
    (pushed,) = in_json(say("push", world.run.path, NAME, *options))
    assert pushed["revision"] == world.head().oid and pushed["purged"] is None
    say("delete", world.run.path, "--subject", "person 3")
    (pushed,) = in_json(say("push", world.run.path, NAME, *options))
    assert pushed["purged"]["left"] == [] and pushed["purged"]["how"] == "squashed"
    pulled = in_json(say("pull", NAME, "--json"))
    assert pulled["directory"] == "adapters" and pulled["predicate"]["repository"] == NAME
    (purged,) = in_json(say("purge", world.run.path, NAME, "--json"))
    assert set(purged["revisions"].values()) == {"404"}


def test_what_is_left_is_said_and_exits_with_1(say: Say, world: World) -> None:
    world.loop.lfs_suffixes = ()
    world.push()
    world.repository().pulls["refs/pr/1"] = world.head().oid
    world.run.delete(["person 3"])
    answer = say("push", world.run.path, NAME, "--base_model", BASE)
    error = one_line(answer, 1)
    assert f"{NAME} still serves what was deleted: delete pull requests" in error
    assert "NOT all gone" in answer[1] and "kept by refs/pr/1" in answer[1]
    (pushed,) = in_json(say("push", world.run.path, NAME, "--base_model", BASE, "--json"), code=1)
    assert pushed["purged"]["left"]
    answer = say("push", world.run.path, NAME, "--base_model", BASE, "--fresh", "tester/second")
    assert answer[0] == 0, answer
    assert f"{NAME} was deleted: asked for" in answer[1]


def test_mistakes_are_one_line(say: Say, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.run.path
    assert "is no repository" in one_line(say("push", run, "../x"), 2)
    assert "is no repository" in one_line(say("push", run, NAME, "--base_model", "/models/x"), 2)
    assert "never published to" in one_line(say("purge", run, NAME), 2)
    assert "is not on the Hub" in one_line(say("pull", NAME), 2)
    assert "is not a run" in one_line(say("push", run.parent, NAME), 2)
    assert "is no revision" in one_line(say("pull", NAME, "--revision", "../x"), 2)
    assert "cannot read a public key" in one_line(say("pull", NAME, "--key", "nowhere"), 2)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(run.parent / "token"))
    answer = say("push", run, NAME, "--base_model", BASE)
    assert "hf auth login" in one_line(answer, 2)
    monkeypatch.setattr(client, "CONNECT_SECONDS", 0.1)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    talk_to("http://127.0.0.1:9", monkeypatch)
    answer = say("push", run, NAME, "--base_model", BASE)
    assert "check the network" in one_line(answer, 1)


def test_help_is_quick() -> None:
    """The client of the Hub is imported when it is asked something."""
    code = (
        "import sys\nsys.argv = ['llm-unlearn', 'push', '--help']\n"
        "from llm_unlearn.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('huggingface_hub', 'torch', 'sqlalchemy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n") and "--per-shard" in done.stdout


def test_what_is_due_is_told_without_the_network(say: Say, world: World) -> None:
    world.push()
    world.run.delete(["person 3"])
    before = len(world.loop.log)
    code = (
        "import sys\nfrom llm_unlearn.exact.store import RunDirectory\n"
        "from llm_unlearn.hub.state import describe\n"
        f"print(*describe(RunDirectory.open({str(world.run.path)!r})))\n"
        "assert 'huggingface_hub' not in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "still serves revision" in done.stdout and len(world.loop.log) == before


LOAD = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.tiny import make_tiny_model

def load(name, **options):
    model = PeftModel.from_pretrained(make_tiny_model(), name, **options)
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits
    held = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    return logits, {k.replace(".default", ""): v for k, v in held.items()}

for name, local, options in json.loads(sys.argv[1]):
    try:
        logits, held = load(name, **options)
    except Exception as error:
        print(type(error).__name__)
        continue
    expected = load(local)[0]
    tensors = load_file(local + "/adapter_model.safetensors")
    same = held.keys() == tensors.keys() and all(torch.equal(held[k], tensors[k]) for k in held)
    print(bool(same and torch.equal(logits, expected)))
"""


def load_in_peft(world: World, home: Path, wanted: list[tuple[str, str, dict]]) -> list[str]:
    """`PeftModel.from_pretrained(repository)` in a process that talks to our Hub, beside the served files."""
    environment = {
        **os.environ, "HF_ENDPOINT": world.loop.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-c", LOAD, json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_peft_loads_what_was_pushed_to_the_bit(world: World, tmp_path: Path) -> None:
    served = world.run.directory.served
    (first,) = world.push()
    single = make_trained(tmp_path / "single", num_shards=1)
    from llm_unlearn.hub import publishing

    publishing.push(single, "tester/one", publishing.Options(base_model=BASE), world.hub)
    world.run.delete(["person 3"])
    world.push()
    found = load_in_peft(
        world,
        tmp_path / "home",
        [
            ("tester/one", str(single / "served" / "shard-0"), {}),
            (NAME, str(served / "shard-0"), {"subfolder": "shard-0"}),
            (NAME, str(served / "shard-1"), {"subfolder": "shard-1"}),
            (NAME, str(served / "shard-1"), {"subfolder": "shard-1", "revision": first.revision}),
        ],
    )
    assert found[:3] == ["True"] * 3
    assert found[3] not in ("True", "False"), "an old revision was loaded"
