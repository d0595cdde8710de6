"""Run directories: what a search or a training leaves behind, and how it goes on."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
