"""Forget quality: can truth ratios tell the unlearned model from a retrained one?

Inputs: predictions (float), truth ratios of the unlearned model on the forget set; references
(float), those of the retrained model on the same questions.

Source: Maini et al., TOFU (arXiv 2401.06121), section 2.2.2.
"""

from llm_unlearn.evaluation import modules, tofu


class ForgetQuality(modules.Module):
    inputs = modules.columns(predictions=modules.NUMBER, references=modules.NUMBER)

    def _compute(self, predictions, references):
        result = tofu.forget_quality(modules.numbers(predictions), modules.numbers(references))
        return {"value": result.p_value, **result._asdict()}
