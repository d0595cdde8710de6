"""From a trained Keras model to the phone."""
