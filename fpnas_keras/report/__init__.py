"""The report of a search, a training or a build: a page and plots, made from its files alone.

python -m fpnas_keras.report --run_dir=runs/x
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
