"""Gradient attack: AUC of the norm of the loss's gradient, members against fresh text.

Inputs: predictions (float), the norm of the gradient of each text's loss; references (int), 1 for
a member, 0 for fresh text.

Source: Wang et al., Pandora's White-Box (arXiv 2402.17012).
"""

from llm_unlearn.evaluation import modules


class GradientNorm(modules.Module):
    inputs = modules.columns(predictions=modules.NUMBER, references=modules.FLAG)

    def _compute(self, predictions, references):
        return modules.attack((-norm for norm in modules.numbers(predictions)), references)
