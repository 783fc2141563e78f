"""Ray Data with segmentation_models_pytorch: read_images, an actor for map_batches, write_parquet."""

from typing import Any

import numpy as np
import ray

from tests.bench.programs.arguments import arguments


class Segmenter:
    """A UNet++ with a ResNet34 encoder; random weights."""

    def __init__(self) -> None:
        import torch

        from tests.bench.programs import torchvision_operators  # noqa: F401
        import segmentation_models_pytorch as smp  # isort: skip

        self.model = smp.UnetPlusPlus("resnet34", encoder_weights=None, in_channels=3, classes=1).eval()
        self.mean, self.std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Masks of a batch of images of one size."""
        import torch

        with torch.inference_mode():
            x_BHWC = (torch.from_numpy(np.stack(batch["image"])).float() / 255 - self.mean) / self.std
            mask_BHW = self.model(x_BHWC.permute(0, 3, 1, 2).contiguous())[:, 0].sigmoid() > 0.5
        return {"path": batch["path"], "mask": mask_BHW.numpy().astype(np.uint8)}


if __name__ == "__main__":
    asked = arguments(__doc__)
    ray.init(address="local", log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    images = ray.data.read_images(str(asked.images), mode="RGB", include_paths=True)
    images.map_batches(Segmenter, batch_size=8, concurrency=1).write_parquet(str(asked.output))
