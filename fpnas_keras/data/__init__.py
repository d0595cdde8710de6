"""Images for searching and training: read by name, made into batches."""

from fpnas_keras.data.batches import search_batches, test_batches, train_batches
from fpnas_keras.data.reading import Images, load, split

__all__ = ["Images", "load", "search_batches", "split", "test_batches", "train_batches"]
