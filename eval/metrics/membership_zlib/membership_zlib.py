"""zlib attack: AUC of the mean log-probability over the compressed size, members against fresh text.

Inputs: predictions (list of float), the log-probabilities of each text's tokens; texts (str), the
texts; references (int), 1 for a member, 0 for fresh text.

Source: Carlini et al. (arXiv 2012.07805), section 5.2.
"""

from llm_unlearn.evaluation import modules
from llm_unlearn.evaluation.membership import zlib_score


class MembershipZlib(modules.Module):
    inputs = modules.columns(
        predictions=modules.NUMBERS, texts=modules.TEXT, references=modules.FLAG
    )

    def _compute(self, predictions, texts, references):
        return modules.attack(map(zlib_score, predictions, texts), references)
