"""The arguments of a search that take a name. Flags list them before TensorFlow loads."""

DISTRIBUTIONS = ("factorized", "joint", "coarse_to_fine")
COST_PENALTIES = ("expected", "hinge", "log")
# The distribution at the start; see `ArchitectureSearch`.
STARTS = ("target", "uniform")
