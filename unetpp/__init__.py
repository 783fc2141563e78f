"""UNet++ as arrays and tensors: model, pruning, tiles, images. No network, no Ray, no Prefect."""
