"""Fast probabilistic neural architecture search for mobile vision, in Keras 3.

import fpnas_keras as fpnas

The public names are listed in `__init__.pyi`. Each one is loaded when it is first used (PEP 562).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.3.0"
