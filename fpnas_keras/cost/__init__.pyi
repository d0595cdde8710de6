from .costs import COSTS, Cost, LatencyCost, MacsCost, ParamsCost, format_cost, make_cost
from .space_cost import SpaceCost
