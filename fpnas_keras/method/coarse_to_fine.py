"""The callback that makes a search joint at an epoch."""

import keras

from fpnas_keras.errors import UserError


class CoarseToFine(keras.callbacks.Callback):
    """Converts the factorized logits of an `ArchitectureSearch` into joint logits.

    Args:
        epoch: Number of epochs with factorized logits.

    Raises:
        UserError: If the search has no joint logits. It is raised when training begins.

    Example:

    ```python
    search = fpnas.ArchitectureSearch(space, distribution="coarse_to_fine")
    search.compile("sgd", "adam")
    search.fit(batches, epochs=30, callbacks=[fpnas.CoarseToFine(epoch=15)])
    ```

    Reference: FP-NAS (arXiv:2011.10949), section on coarse-to-fine search.
    """

    def __init__(self, epoch: int):
        super().__init__()
        self.epoch = epoch

    def on_train_begin(self, logs: dict | None = None) -> None:
        if len(self.model.distributions) == 1:
            raise UserError(
                "`CoarseToFine` needs a search with distribution='coarse_to_fine'. "
                f"Received: a search with {type(self.model.distribution).__name__} only"
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        is_refined = self.model.distribution is self.model.distributions[-1]
        if epoch >= self.epoch and not is_refined:
            self.model.refine()
