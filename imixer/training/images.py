"""The images of a run, and how many of them a process sees at once."""

import contextlib

import timm
from timm.data import resolve_data_config

import imixer.imixer  # noqa: F401  registers the models
from imixer.data import ImageData, TimmTransforms, load_dataset, load_digits
from imixer.training.config import READ_EVERY_EPOCH, TrainingConfig
from imixer.training.distributed import make_accelerator
from imixer.training.model import check_model_name


def load_data(config: TrainingConfig, *, progress: bool = False) -> ImageData:
    """Load the images that `config` names, at the size that its model takes. All processes have to call it.

    Args:
        config: The settings.
        progress: Whether the first process shows a progress bar.

    Raises:
        ValueError: The model or the data set is unknown, or the images have other classes than `config` says.
        OSError: The images are not there.
    """
    check_model_name(config.model)
    accelerator = make_accelerator(config)
    if config.data_dir is None and not config.dataset:
        if (config.train_split, config.val_split) != (TrainingConfig.train_split, TrainingConfig.val_split):
            raise ValueError("--train-split and --val-split name splits of DATA_DIR; digits have none, leave them out")
        unused = [
            name for name in (*READ_EVERY_EPOCH, "augment_on") if getattr(config, name) != getattr(TrainingConfig, name)
        ]
        if unused:
            raise ValueError(
                f"{', '.join(unused)}: for images that are read in every epoch, and digits are held in memory; leave "
                "it out, or give DATA_DIR"
            )
        data = load_digits(img_size=config.img_size or 8, augment=not config.no_aug)
    else:
        if config.data_dir is None:
            raise ValueError(f"dataset {config.dataset} needs the folder that holds it: give DATA_DIR or --data-dir")
        given = {name: getattr(config, name) for name in ("img_size", "interpolation", "crop_pct", "mean", "std")}
        cfg = timm.get_pretrained_cfg(config.model, allow_unregistered=True)
        resolved = resolve_data_config(given, pretrained_cfg=cfg.to_dict() if cfg is not None else {})
        settings = {name: getattr(config, name) for name in ("no_aug", "hflip", *READ_EVERY_EPOCH)}
        settings |= {name: resolved[name] for name in ("interpolation", "crop_pct", "mean", "std")}
        download = config.dataset_download
        with accelerator.local_main_process_first() if download else contextlib.nullcontext():
            data = load_dataset(
                config.dataset,
                config.data_dir,
                img_size=resolved["input_size"][-1],
                transforms=None if config.cache_mb else TimmTransforms(**settings),
                augment_on=config.augment_on,
                augment=not config.no_aug,
                hflip=config.hflip,
                cache_mb=config.cache_mb,
                train_split=config.train_split,
                test_split=config.val_split or None,
                download=download and accelerator.is_local_main_process,
                progress=progress and accelerator.is_main_process,
            )
    if config.num_classes not in (None, len(data.classes)):
        raise ValueError(
            f"num_classes is {config.num_classes}, and {data.name} has {len(data.classes)} classes; leave it out"
        )
    if len(data.classes) < 2:
        raise ValueError(
            f"{data.name} has one class, {data.classes[0]}, and nothing can be learned from one. Classes are the "
            "folders in train/ and test/: if they lie one level lower, give that folder"
        )
    return data
