"""Image sets, pipelines and batches; every sample carries its dataset index."""

from kdfast.data.decoded import keep_decoded
from kdfast.data.loader import Batch, BatchPlan, Loader, Portion
from kdfast.data.named import dataset_name, dataset_names, open_data
from kdfast.data.resident import ResidentImages, ResidentLoader, has_size
from kdfast.data.sources import IMAGENET_MEAN, IMAGENET_STD, ImageData, Source
from kdfast.data.transforms import (
    Augmentation,
    CropFlip,
    Normalise,
    eval_transform,
    to_float,
    train_transform,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augmentation",
    "Batch",
    "BatchPlan",
    "CropFlip",
    "ImageData",
    "Loader",
    "Normalise",
    "Portion",
    "ResidentImages",
    "ResidentLoader",
    "Source",
    "dataset_name",
    "dataset_names",
    "eval_transform",
    "has_size",
    "keep_decoded",
    "open_data",
    "to_float",
    "train_transform",
]
