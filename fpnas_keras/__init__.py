"""Fast probabilistic neural architecture search in Keras.

import fpnas_keras as fpnas
"""

from fpnas_keras import data, spaces
from fpnas_keras.architecture import Architecture
from fpnas_keras.callbacks import CoarseToFine
from fpnas_keras.cost import LatencyCost, MacsCost, ParamsCost
from fpnas_keras.estimator import AdaptiveSamples, CostController
from fpnas_keras.searcher import ArchitectureSearch

__all__ = [
    "AdaptiveSamples",
    "Architecture",
    "ArchitectureSearch",
    "CoarseToFine",
    "CostController",
    "LatencyCost",
    "MacsCost",
    "ParamsCost",
    "data",
    "spaces",
]
