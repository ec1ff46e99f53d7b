"""What training does, measured while it runs: norms, dimensions, timescales, sharpness, gap, and the laws beside them.

`Monitor` attaches to any optimizer.  The functions that it calls, and those that need the loss, stand alone.
"""

from steepest.curvature import hessian_trace
from steepest.dynamics.gap import MemorizationGap
from steepest.dynamics.laws import (
    DimensionFit,
    LogisticFit,
    dimension_fixed_point,
    dimension_path,
    fit_dimension,
    fit_logistic,
    logistic,
)
from steepest.dynamics.monitor import Monitor
from steepest.dynamics.sharpness import Sharpness, hessian_vector_product, sam_sharpness, sharpness
from steepest.dynamics.spectra import Timescales, factor_dimensions, gradient_dimension, stable_rank, timescales

__all__ = [
    "DimensionFit",
    "LogisticFit",
    "MemorizationGap",
    "Monitor",
    "Sharpness",
    "Timescales",
    "dimension_fixed_point",
    "dimension_path",
    "factor_dimensions",
    "fit_dimension",
    "fit_logistic",
    "gradient_dimension",
    "hessian_trace",
    "hessian_vector_product",
    "logistic",
    "sam_sharpness",
    "sharpness",
    "stable_rank",
    "timescales",
]
