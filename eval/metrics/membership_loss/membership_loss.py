"""Loss attack: AUC of the mean log-probability of a text, members against fresh text.

Inputs: predictions (list of float), the log-probabilities of each text's tokens; references (int),
1 for a member, 0 for fresh text.

Source: Yeom et al. (arXiv 1709.01604).
"""

from llm_unlearn.evaluation import modules
from llm_unlearn.evaluation.membership import loss_score


class MembershipLoss(modules.Module):
    inputs = modules.columns(predictions=modules.NUMBERS, references=modules.FLAG)

    def _compute(self, predictions, references):
        return modules.attack(map(loss_score, predictions), references)
