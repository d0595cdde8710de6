"""What a network costs, and what a search may spend."""

from fpnas_keras.cost.costs import COSTS, LatencyCost, MacsCost, ParamsCost, make_cost, text
from fpnas_keras.cost.table import CostTable

__all__ = ["COSTS", "CostTable", "LatencyCost", "MacsCost", "ParamsCost", "make_cost", "text"]
