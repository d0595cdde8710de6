"""Images for searching and training: read by name, made into batches."""

from fpnas_keras.data.augmentation import Augmentation
from fpnas_keras.data.batches import search_batches, test_batches, train_batches
from fpnas_keras.data.reading import Images, load, split

__all__ = [
    "Augmentation",
    "Images",
    "load",
    "search_batches",
    "split",
    "test_batches",
    "train_batches",
]
