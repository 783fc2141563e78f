"""MONAI: a DataLoader over transforms, sliding_window_inference, SaveImage; its UNet++ with our widths."""

import torch
from monai.data import DataLoader, Dataset, decollate_batch
from monai.inferers import sliding_window_inference
from monai.networks.nets import BasicUNetPlusPlus
from monai.transforms import Activations, AsDiscrete, Compose, EnsureChannelFirst, LoadImage, SaveImage, ScaleIntensity

from tests.bench.programs.arguments import arguments

FEATURES = (32, 64, 128, 256, 512, 32)
WINDOW_PX = 256

if __name__ == "__main__":
    asked = arguments(__doc__)
    paths = sorted(map(str, asked.images.glob("*.png")))
    read = Compose([LoadImage(image_only=True), EnsureChannelFirst(), ScaleIntensity()])
    loader = DataLoader(Dataset(paths, read), batch_size=1, num_workers=2)
    model = BasicUNetPlusPlus(spatial_dims=2, in_channels=3, out_channels=1, features=FEATURES).eval()
    decide = Compose([Activations(sigmoid=True), AsDiscrete(threshold=0.5)])
    save = SaveImage(
        asked.output, output_ext=".png", output_postfix="seg", scale=255, separate_folder=False, print_log=False
    )
    with torch.no_grad():
        for images in loader:
            outputs = sliding_window_inference(images, (WINDOW_PX, WINDOW_PX), 4, lambda x: model(x)[0])
            for output in decollate_batch(outputs):
                save(decide(output))
