"""Fast probabilistic neural architecture search for mobile vision, in Keras 3.

import fpnas_keras as fpnas

The public names are listed in `__init__.pyi`. Each one is loaded when it is first used (PEP 562).
"""

import os

import lazy_loader

# Kernels of oneDNN: TensorFlow takes them by itself on few processors, such as those with AVX-512
# VNNI. On one with AVX2 a training step takes 0.6 of the time with them (docs/benchmarks.md).
# TensorFlow reads this variable when it is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.3.0"
