"""Optimizers with torch.optim's interface, one class per file."""

from steepest.optim.adagrad import Adagrad
from steepest.optim.adam import Adam
from steepest.optim.adamw import AdamW
from steepest.optim.convert import from_apex, from_bitsandbytes
from steepest.optim.freeze import frozen_batchnorm
from steepest.optim.lion import Lion
from steepest.optim.muon import Muon
from steepest.optim.normed_descent import NormedDescent
from steepest.optim.penalty import CurvaturePenalty, GradientNormPenalty
from steepest.optim.rmsprop import RMSprop
from steepest.optim.sam import SAM
from steepest.optim.sam_variants import GSAM, FriendlySAM, LookSAM, MomentumSAM
from steepest.optim.sgd import SGD
from steepest.optim.shampoo import Shampoo

__all__ = [
    "GSAM",
    "SAM",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "CurvaturePenalty",
    "FriendlySAM",
    "GradientNormPenalty",
    "Lion",
    "LookSAM",
    "MomentumSAM",
    "Muon",
    "NormedDescent",
    "RMSprop",
    "Shampoo",
    "from_apex",
    "from_bitsandbytes",
    "frozen_batchnorm",
]
