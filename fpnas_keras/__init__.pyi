from . import cost, data, method, networks, report, runs, spaces
from .architecture import Architecture
from .cost import Cost, LatencyCost, MacsCost, ParamsCost
from .errors import UserError
from .method import AdaptiveSamples, ArchitectureSearch, CoarseToFine, CostController
from .rank import rank_architectures
from .search import search_architecture
from .train import train_architecture

__version__: str
