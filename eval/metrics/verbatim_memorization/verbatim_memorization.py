"""VerbMem: does a model continue a text of the forget set as it was written?

Inputs: predictions (str), the continuations; references (str), the true ones. stemmer: bool.

Source: Shi et al., MUSE (arXiv 2407.06460), criterion C1.
"""

from llm_unlearn.evaluation import modules, text


class VerbatimMemorization(modules.Module):
    inputs = modules.columns(predictions=modules.TEXT, references=modules.TEXT)

    def _compute(self, predictions, references, stemmer=False):
        scores = map(text.rouge, predictions, references, [stemmer] * len(references))
        return modules.mean(score.rougeL_f1 for score in scores)
