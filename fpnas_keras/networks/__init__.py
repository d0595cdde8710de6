"""Networks: the shared weights of a space, and plain Keras models of single architectures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
