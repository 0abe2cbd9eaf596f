"""What a classifier's answers still need after training, fitted on its dev rows and nothing else: the temperature, then the threshold."""

from __future__ import annotations

import numpy as np

from danlu.evaluate.calibration import fit_temperature, probabilities
from danlu.evaluate.score import Evaluation
from danlu.spec.task import Classification
from danlu.tasks.decision import choose_threshold, cost_matrix
from danlu.tasks.predictor import Predictor
from danlu.tasks.rows import Split


def fit_on_dev(predictor: Predictor, dev: Split, found: Evaluation) -> Evaluation:
    """Make the predictor answer as its task asks for; the evaluation of the dev rows as it answers now."""
    task, outputs, labels = predictor.task, found.outputs, dev.labels
    assert isinstance(task, Classification)
    assert labels is not None
    if task.calibration is not None and task.calibration.temperature is None:
        temperature = fit_temperature(outputs, labels)
        outputs = outputs / np.float32(temperature)
        task = task.model_copy(update={"calibration": task.calibration.model_copy(update={"temperature": temperature})})
    if task.decision is not None and task.decision.threshold is None and len(predictor.label_names) == 2:
        costs = cost_matrix(task.decision, predictor.label_names)
        threshold = choose_threshold(probabilities(outputs)[:, 1], labels, costs)
        task = task.model_copy(update={"decision": task.decision.model_copy(update={"threshold": threshold})})
    predictor.set_task(task)
    return Evaluation(predictor.scores(outputs, dev), outputs, found.seconds)
