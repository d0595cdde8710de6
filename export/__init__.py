"""From a trained Keras model to the phone: `.tflite` files, and latency tables of devices.

The public names are listed in `__init__.pyi`. Each one is loaded when it is first used (PEP 562).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
