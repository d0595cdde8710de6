from . import cost as cost
from . import data as data
from . import method as method
from . import networks as networks
from . import report as report
from . import runs as runs
from . import spaces as spaces
from .architecture import Architecture as Architecture
from .building.build import build as build
from .cost import Cost as Cost
from .cost import FileSizeCost as FileSizeCost
from .cost import LatencyCost as LatencyCost
from .cost import MacsCost as MacsCost
from .cost import ParamsCost as ParamsCost
from .errors import UserError as UserError
from .method import AdaptiveSamples as AdaptiveSamples
from .method import ArchitectureSearch as ArchitectureSearch
from .method import CoarseToFine as CoarseToFine
from .method import CostController as CostController
from .rank import rank_architectures as rank_architectures
from .search import search_architecture as search_architecture
from .train import train_architecture as train_architecture

__version__: str
