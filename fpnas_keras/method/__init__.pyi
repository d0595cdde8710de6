from .architecture_search import ArchitectureSearch
from .coarse_to_fine import CoarseToFine
from .derivation import Derivation, most_probable
from .distributions import BlockLogits, FactorizedLogits, JointLogits
from .estimator import AdaptiveSamples, CostController, Samples
