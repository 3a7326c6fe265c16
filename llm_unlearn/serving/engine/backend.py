"""A run that is served: engine, scheduler and heartbeat, opened and closed as one."""

import logging
import threading
from collections.abc import Mapping, Sequence

from transformers.utils import logging as transformers_logging

from llm_unlearn.errors import UserError
from llm_unlearn.exact.base_model import load_base_of
from llm_unlearn.exact.ensemble import ShardEnsemble
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.serving.engine.engine import BatchEngine
from llm_unlearn.serving.engine.memory import Memory
from llm_unlearn.serving.engine.reading import Reading
from llm_unlearn.serving.engine.replicas import BEAT_SECONDS, Replicas
from llm_unlearn.serving.engine.scheduler import Scheduler
from llm_unlearn.serving.policy import Policy

log = logging.getLogger(__name__)


class Backend:
    """What answers for one run in this process.

    Args:
        max_batch: rows in one forward pass.
        max_waiting: queries that wait; one more is refused.
        name: of this server among the run's.

    Raises:
        UserError: nothing is served there, the base model cannot be loaded, or the policy's threshold
            is more than there are shards.
        RunError: another live server has the name.

    Attributes:
        tokenizer: of the base model.
    """

    def __init__(
        self,
        run: S3TRun,
        policy: Policy,
        max_batch: int = 64,
        max_waiting: int = 256,
        name: str | None = None,
    ):
        self.replicas = Replicas(run.directory, name)
        self.replicas.claim()
        self.replicas.beat(run.directory.ledger.epoch())  # what is loaded from now on is as new
        try:
            self._open(run, policy, max_batch, max_waiting)
        except BaseException:
            self.replicas.leave()
            raise

    def _open(self, run: S3TRun, policy: Policy, max_batch: int, max_waiting: int) -> None:
        run.settle()  # what a crash left acknowledged is carried out before anything is loaded
        directory = run.directory
        self.run, self.policy = run, policy.for_shards(max(1, len(directory.shards)))
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # it warns of long prompts, which are refused
        model, self.tokenizer = load_base_of(directory)
        self.ensemble = ShardEnsemble.from_run(
            model, directory.served, directory.config.rule, self.tokenizer
        )
        memory = Memory(directory, self.ensemble, policy.is_unsafe)
        self._is_changed = threading.Event()
        self._unheard: str | None = None
        self._is_closed = False
        self.scheduler = Scheduler(
            directory,
            self.policy,
            lambda: memory.affected("retrained"),
            lambda: self.engine.notice(),
        )
        reading = Reading(self.tokenizer, model, self.ensemble.rule.aggregate)
        self.engine = BatchEngine(
            memory, reading, self.policy, max_batch, max_waiting,
            on_change=self._changed, on_uncertified=self.scheduler.uncertified,
        )  # fmt: skip
        self._beats = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beats.start()
        self.scheduler.start()

    def asked_in(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """The part of a conversation that decides who answers; None: all of it."""
        return None if self.ensemble.words is None else self.ensemble.asked_in(messages)

    @property
    def problem(self) -> str | None:
        """Why what is pending is not executed, or not known to be; None while all is well."""
        return self._unheard or self.scheduler.problem

    def _changed(self) -> None:
        self.scheduler.wake()
        self._is_changed.set()

    def _beat(self) -> None:
        """Tell the others how far this server has followed the ledger."""
        while not self._is_closed:
            self._beat_once()
            self._is_changed.wait(BEAT_SECONDS)
            self._is_changed.clear()

    def _beat_once(self) -> None:
        try:
            self.replicas.beat(self.engine.followed)
        except (OSError, UserError) as error:
            if self._unheard is None:
                log.warning("no deletion counts as erased, for want of a heartbeat: %s", error)
            self._unheard = str(error)
        else:
            self._unheard = None

    def close(self) -> None:
        self._is_closed = True
        self._is_changed.set()
        self.scheduler.close()
        self.engine.close()
        self._beats.join()
        self.replicas.leave()
