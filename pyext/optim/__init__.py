"""Optimizers with torch.optim's interface, one class per file."""

from steepest.optim.adagrad import Adagrad
from steepest.optim.adam import Adam
from steepest.optim.adamw import AdamW
from steepest.optim.lion import Lion
from steepest.optim.muon import Muon
from steepest.optim.normed_descent import NormedDescent
from steepest.optim.rmsprop import RMSprop
from steepest.optim.sgd import SGD
from steepest.optim.shampoo import Shampoo

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "Muon", "NormedDescent", "RMSprop", "Shampoo"]
