"""What every program is told."""

import argparse
from pathlib import Path


def arguments(description: str | None) -> argparse.Namespace:
    """Folders of images and masks, and the model folder of those that compute with ours."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--level", type=int, default=4)
    return parser.parse_args()
