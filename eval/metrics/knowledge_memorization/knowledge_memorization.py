"""KnowMem: does a model answer questions about a set's content?

Inputs: predictions (str), the answers; references (str), the right ones. stops, stemmer.

Source: Shi et al., MUSE (arXiv 2407.06460), criteria C2 (forget set) and C4 (retain set).
"""

from llm_unlearn.evaluation import modules, text

STOPS = ("\n\n", "\nQuestion", "Question:")


class KnowledgeMemorization(modules.Module):
    inputs = modules.columns(predictions=modules.TEXT, references=modules.TEXT)

    def _compute(self, predictions, references, stops=STOPS, stemmer=False):
        answers = (text.cut(prediction, stops) for prediction in predictions)
        scores = map(text.rouge, answers, references, [stemmer] * len(references))
        return modules.mean(score.rougeL_f1 for score in scores)
