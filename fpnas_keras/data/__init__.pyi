from .augmentation import Augmentation
from .batches import search_batches, test_batches, train_batches
from .reading import Images, load, split
from .settings import DataSettings
