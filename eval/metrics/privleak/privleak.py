"""PrivLeak: how far a membership attack's AUC is from that on a retrained model, in percent.

Inputs: predictions (float), scores that are higher for likelier members; references (int), 1 for
the forget set, 0 for fresh text. retrain_predictions (scores of the retrained model on the same
rows) or retrain_auc (members positive) is required. epsilon: float.

Source: Shi et al., MUSE (arXiv 2407.06460), criterion C3.
"""

from llm_unlearn.evaluation import modules
from llm_unlearn.evaluation.membership import Scores, privleak


class PrivLeak(modules.Module):
    inputs = modules.columns(predictions=modules.NUMBER, references=modules.FLAG)

    def _compute(
        self, predictions, references, retrain_auc=None, retrain_predictions=None, epsilon=0.0
    ):
        if (retrain_auc is None) == (retrain_predictions is None):
            raise ValueError(
                "PrivLeak needs either retrain_auc or retrain_predictions, of a model retrained "
                "without the forget set"
            )
        retrain = retrain_auc
        if retrain_predictions is not None:
            retrain = Scores(*modules.split(retrain_predictions, references))
        unlearned = Scores(*modules.split(predictions, references))
        return privleak(unlearned, retrain, epsilon)._asdict()
