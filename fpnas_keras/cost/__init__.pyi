from .costs import COSTS as COSTS
from .costs import Cost as Cost
from .costs import LatencyCost as LatencyCost
from .costs import MacsCost as MacsCost
from .costs import ParamsCost as ParamsCost
from .costs import format_cost as format_cost
from .costs import make_cost as make_cost
from .space_cost import SpaceCost as SpaceCost
