"""Costs of networks: MACs, parameters, bytes of int8 files, milliseconds from latency tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
