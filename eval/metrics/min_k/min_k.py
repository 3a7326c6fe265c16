"""Min-K%: AUC of the mean log-probability of a text's least likely tokens, members against fresh text.

Inputs: predictions (list of float), the log-probabilities of each text's tokens; references (int),
1 for a member, 0 for fresh text. share: float; at_least_one: bool.

Source: Shi et al. (arXiv 2310.16789).
"""

from llm_unlearn.evaluation import modules
from llm_unlearn.evaluation.membership import LOWEST_SHARE, min_k_score


class MinK(modules.Module):
    inputs = modules.columns(predictions=modules.NUMBERS, references=modules.FLAG)

    def _compute(self, predictions, references, share=LOWEST_SHARE, at_least_one=True):
        scores = (min_k_score(row, share, at_least_one) for row in predictions)
        return modules.attack(scores, references)
