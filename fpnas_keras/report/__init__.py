"""The report of a search: a page and plots, made from the files of its run directory alone.

python -m fpnas_keras.report --search_dir=runs/x
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
