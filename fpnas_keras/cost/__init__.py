"""What a network costs, and what a search may spend."""

from fpnas_keras.cost.costs import MacsCost, ParamsCost
from fpnas_keras.cost.table import CostTable

__all__ = ["CostTable", "MacsCost", "ParamsCost"]
