"""Min-K%++: Min-K% of log-probabilities standardised by the model's own spread at each token.

Inputs: predictions (list of float), the log-probabilities of each text's tokens; means and
deviations (list of float), of log p(v) with v drawn from the model at each place; references
(int), 1 for a member, 0 for fresh text. share: float.

Source: Zhang et al. (arXiv 2404.02936).
"""

from llm_unlearn.evaluation import modules
from llm_unlearn.evaluation.membership import LOWEST_SHARE, min_k_plus_plus_score


class MinKPlusPlus(modules.Module):
    inputs = modules.columns(
        predictions=modules.NUMBERS,
        means=modules.NUMBERS,
        deviations=modules.NUMBERS,
        references=modules.FLAG,
    )

    def _compute(self, predictions, means, deviations, references, share=LOWEST_SHARE):
        shares = [share] * len(predictions)
        scores = map(min_k_plus_plus_score, predictions, means, deviations, shares)
        return modules.attack(scores, references)
