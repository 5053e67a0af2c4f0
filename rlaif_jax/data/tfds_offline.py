"""TensorFlow Datasets without a network and without TensorFlow: import `tfds` only from here."""

import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import gcs_utils

__all__ = ["tfds"]

# Some releases look a data set up in TFDS's public bucket, which imports TensorFlow and needs a network.
gcs_utils._is_gcs_disabled = True
