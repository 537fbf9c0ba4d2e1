"""Evaluation of the global model: on the pooled test set, and per client from the same pass."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from .functional import call
from .loss import ModelLoss
from .state import Masks, Params
from .task import Task


@torch.no_grad()
def evaluate(task: Task, loss: ModelLoss, params: Params, buffers: Params, mask: Masks) -> dict[str, float]:
    """Accuracies as fractions in [0, 1], and the mean cross-entropy.

    `test_accuracy` is over the pooled test set; `client_accuracy` the unweighted mean over all clients, or a
    fixed sample of a `drawn` pool, of the accuracy on the client's own test samples (the papers' metric).
    """
    weights = task.layout.params(loss.weights(params, mask))
    task.model.eval()
    losses, hits = [], []
    for inputs, targets in task.test_batches():
        outputs = call(task.model, {**weights, **buffers}, task.layout.arrange(inputs))
        losses.append(cross_entropy(outputs, targets, reduction="sum"))
        hits.append(outputs.argmax(1) == targets)
    correct = torch.cat(hits).cpu().numpy()
    indices, offsets = task.partition.tested
    own = np.add.reduceat(correct[indices].astype(np.int64), offsets[:-1])
    return {
        "test_accuracy": float(correct.mean()),
        "test_loss": float(torch.stack(losses).sum()) / len(correct),
        "client_accuracy": float((own / np.diff(offsets)).mean()),
    }
