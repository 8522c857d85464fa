"""Images to train on: scikit-learn's digits, a folder of images, or a data set that timm knows by name.

`load_digits`, `load_image_folder` and `load_dataset` return an `ImageData`; `make_loader` makes batches of it. What a
training image looks like depends on the seed, the epoch and its index alone.
"""

from imixer.data.decoding import UnreadableImageError
from imixer.data.folders import TEST_FOLDERS
from imixer.data.image_data import ImageData
from imixer.data.images import BatchKey, ImageBatch, Images, InMemoryImages, RawBatch, TransformedImages
from imixer.data.loader import EpochBatches, ImageLoader, LoaderError, make_loader
from imixer.data.loading import load_dataset, load_digits, load_image_folder
from imixer.data.named_datasets import load_sources
from imixer.data.sources import ImageSource
from imixer.data.transforms import TimmTransforms

__all__ = [
    "BatchKey",
    "EpochBatches",
    "ImageBatch",
    "ImageData",
    "ImageLoader",
    "ImageSource",
    "Images",
    "InMemoryImages",
    "LoaderError",
    "RawBatch",
    "TEST_FOLDERS",
    "TimmTransforms",
    "TransformedImages",
    "UnreadableImageError",
    "load_dataset",
    "load_digits",
    "load_image_folder",
    "load_sources",
    "make_loader",
]
