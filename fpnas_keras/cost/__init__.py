"""What a network costs, and what a search may spend."""

from fpnas_keras.cost.costs import LatencyCost, MacsCost, ParamsCost, text
from fpnas_keras.cost.table import CostTable

__all__ = ["CostTable", "LatencyCost", "MacsCost", "ParamsCost", "text"]
