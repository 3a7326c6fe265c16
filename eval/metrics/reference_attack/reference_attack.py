"""Reference attack: AUC of a text's mean log-probability, less that under a model that never saw it.

Inputs: predictions and reference_predictions (list of float), the log-probabilities of each text's
tokens under both models; references (int), 1 for a member, 0 for fresh text.

Source: Carlini et al. (arXiv 2012.07805), section 5.2.
"""

from llm_unlearn.evaluation import modules
from llm_unlearn.evaluation.membership import reference_score


class ReferenceAttack(modules.Module):
    inputs = modules.columns(
        predictions=modules.NUMBERS, reference_predictions=modules.NUMBERS, references=modules.FLAG
    )

    def _compute(self, predictions, reference_predictions, references):
        return modules.attack(map(reference_score, predictions, reference_predictions), references)
