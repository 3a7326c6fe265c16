"""The few endpoints of a vLLM server that loading adapters at run time needs.

Read in vLLM's source (`vllm/entrypoints/openai/models/serving.py` and `serve/lora/api_router.py`); both
endpoints exist only with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`.
"""

import re
import time
from email.utils import parsedate_to_datetime

from llm_unlearn.errors import RunError
from llm_unlearn.exact.adapters import NAME
from llm_unlearn.exact.copies import Copy, known
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.serving.outside.http_client import Reply, Server
from llm_unlearn.serving.outside.models import answers_to, ensure_allowed, served_models

MEMORY = "vllm-memory"
"""Kind of copy: what was loaded into a server stays in its memory until it is started again."""
STARTED = re.compile(r"^process_start_time_seconds(?:\{[^}]*\})? (\S+)$", re.M)
NOT_ALLOWED = (
    "does not load adapters at run time: start it with --enable-lora and "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
)


class Refused(RunError):
    """The server said that it does not load an adapter; nothing of it was loaded."""


class VllmServer:
    """A vLLM server, by its adapters."""

    def __init__(self, server: Server):
        self.server = server
        self.url = server.url

    def listed(self) -> dict[str, str]:
        """Adapters that it serves: by name, the path that it loaded each from.

        Raises:
            RunError: it cannot be asked.
        """
        return {
            card["id"]: str(card.get("root") or "")
            for card in served_models(self.server)
            if card.get("parent") or NAME.fullmatch(card["id"])
        }

    def load(self, name: str, path: str) -> None:
        """Load an adapter; one that is there from the same path already is as good.

        Whether it did what it says is for `listed` to say, once for all that were loaded.

        Raises:
            Refused: it says that it does not, say because the rank is too high.
            RunError: it cannot be asked, or fails.
        """
        body = {"lora_name": name, "lora_path": path}
        reply = ensure_allowed(self.server.post("/v1/load_lora_adapter", body), self.server)
        self._ensure_there_is_such(reply)
        if reply.status == 200:
            return
        listed = self.listed()
        if listed.get(name) == path:
            return
        told = f"{self.url} does not load {name}: {reply.message}"
        raise (Refused if 400 <= reply.status < 500 and name not in listed else RunError)(told)

    def unload(self, name: str) -> None:
        """Make it forget a name; one that it does not know is as good.

        Raises:
            RunError: it does not, or cannot be asked.
        """
        reply = ensure_allowed(
            self.server.post("/v1/unload_lora_adapter", {"lora_name": name}), self.server
        )
        self._ensure_there_is_such(reply)
        if reply.status not in (200, 404):
            raise RunError(f"{self.url} does not unload {name}: {reply.message}. Restart it")

    def is_gone(self, name: str) -> bool:
        """Is an adapter neither listed nor answering?

        Raises:
            RunError: that cannot be told.
        """
        if name in self.listed():
            return False
        answers = answers_to(self.server, name)
        if answers is None:
            raise RunError(f"{self.url} does not tell whether {name} still answers: try again")
        return not answers

    def started_at(self) -> float | None:
        """When the server was started, by this machine's clock; None where it does not say."""
        reply = self.server.get("/metrics")
        found = STARTED.search(reply.text) if reply.status == 200 else None
        if found is None or reply.date is None:
            return None
        try:
            age = parsedate_to_datetime(reply.date).timestamp() - float(found[1])
        except (ValueError, TypeError, OverflowError):
            return None
        return time.time() - age

    def _ensure_there_is_such(self, reply: Reply) -> None:
        """An unknown adapter and an unknown endpoint are both 404; only the first names an error."""
        if reply.status in (404, 405) and b'"error"' not in reply.body:
            raise RunError(f"{self.url} {NOT_ALLOWED}")


def place_in_memory(url: str, name: str) -> str:
    """Where a copy in a server's memory is, as the register says it."""
    return f"{url} {name}"


def in_memory_of(run: RunDirectory, url: str) -> list[Copy]:
    """What was loaded into a server and is not known to be gone from its memory."""
    return [
        copy
        for copy in known(run)
        if copy.kind == MEMORY and copy.gone is None and copy.place.startswith(f"{url} ")
    ]
