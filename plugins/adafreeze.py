"""AdaFreeze: PFFDST's freezing and rewiring under the adaptive server of FedAdam, a combination of slots.

PFFDST makes rounds cheap: one half of the network trains and travels at a time. Its model moves to the mean
of few, very different clients, and jumps about from round to round. FedAdam's server takes that mean as a
noisy gradient instead, with momentum and a step by weight, and costs no byte. What has left the mask, is
frozen or was drawn anew has no momentum.

Fidelity: no paper's method; the parts are those of `pffdst` and `fedadam`, as they are there. Found on
CIFAR-10 with LeNet, seed 100; its evidence, on other seeds, is the table papers/lenet-cifar10: ahead of
PFFDST by 2.7 points with 2 local epochs a round, which three seeds do not show, and as far as it with 4.
"""

from __future__ import annotations

from ..core.method import Method
from .fedadam import AdaptiveServer
from .pffdst import CodeCost, FreezeHalf, ServerReadjust

METHOD = Method(
    "adafreeze",
    freeze_policy=FreezeHalf(),
    readjust=ServerReadjust(),
    aggregate=AdaptiveServer(),
    extras=(CodeCost(),),
    paper="fedsparse: PFFDST (AAAI 25) under the server of FedAdam (ICLR 2021)",
)
