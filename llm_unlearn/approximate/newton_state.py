"""What an interrupted Newton run goes on from: one file, replaced after every step."""

import json

from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save

from llm_unlearn import files
from llm_unlearn.approximate.claim import STEPS_NAME
from llm_unlearn.approximate.cubic_newton import CubicNewton
from llm_unlearn.approximate.curvature import flat
from llm_unlearn.approximate.newton_problem import NewtonProblem
from llm_unlearn.approximate.tuning import copied


def keep_state(problem: NewtonProblem, newton: CubicNewton, stopped: str) -> None:
    """Write weights and history; not with `--save_strategy no`. By the main process alone."""
    session = problem.session
    if session.config.save_strategy == "no" or not PartialState().is_main_process:
        return
    told = {
        "weight": newton.weight,
        "history": newton.history,
        "level": problem.level,
        "stopped": stopped,
    }
    session.work.mkdir(parents=True, exist_ok=True)
    data = save(copied(session.tuned.trainable), {"state": json.dumps(told)})
    files.write_bytes(session.work / STEPS_NAME, data)


def take_up_state(problem: NewtonProblem, newton: CubicNewton) -> str:
    """Go on where an earlier call was, if there was one. Whose work directory it is has been asked
    before (`claim`); what `--unseen` holds is asked here.

    Returns:
        Why that call had stopped; empty: it had not.
    """
    session = problem.session
    path = session.work / STEPS_NAME
    if not path.exists():
        return ""
    with safe_open(path, framework="pt") as stored:
        told = json.loads((stored.metadata() or {})["state"])
        if told["level"] != problem.level:
            return ""
        problem.put(flat([stored.get_tensor(name) for name in session.tuned.trainable]))
    newton.weight, newton.history = told["weight"], told["history"]
    return told["stopped"]
