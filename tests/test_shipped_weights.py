"""The weights that come with the package."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import imixer  # noqa: F401  registers the models


def test_timm_loads_them():
    """For CIFAR-10's classes and for others, and for features."""
    model = timm.create_model("imixer_ti4_32", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"][0] == "airplane"
    bare = timm.create_model("imixer_ti4_32", pretrained=True, num_classes=0).eval()
    features = timm.create_model("imixer_ti4_32", pretrained=True, features_only=True).eval()
    other = timm.create_model("imixer_ti4_32", pretrained=True, num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.head(bare(x)), model(x))
        torch.testing.assert_close(features(x)[-1], model.forward_intermediates(x, intermediates_only=True)[-1])
    assert other.head.out_features == 3
    assert torch.equal(other.blocks[3].mlp_channels.fc1.weight, model.blocks[3].mlp_channels.fc1.weight)


@pytest.mark.long
def test_they_tell_images_apart():
    """On the first ten test images of each class, where they are at hand: 76.85% are right on all 10,000."""
    archive = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip("needs CIFAR-10 in ../shared/data")
    model = timm.create_model("imixer_ti4_32", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    names, count, right = model.pretrained_cfg["label_names"], {}, 0
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if "test" not in parts or not member.isfile() or count.get(parts[-2], 0) == 10:
                continue
            count[parts[-2]] = count.get(parts[-2], 0) + 1
            pixels = np.array(Image.open(tar.extractfile(member)).convert("RGB"))
            x = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
            with torch.no_grad():
                right += names[model(x[None]).argmax()] == parts[-2]
    assert sum(count.values()) == 100
    assert right > 60
