"""Golden of random resized crops: torchvision's boxes for given draws, and the pixels that come of them.

`RandomResizedCrop` draws an area, the logarithm of a ratio and a place with torch; here every draw is recorded, so that
another program can be given the same ones. The picture is made by a formula; of the result only its sha256 is kept.

Run: python golden/crops.py [--out DIR]
"""

import hashlib

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from common import arguments, versions, write_json

SIDE = 56
SIZES = [(320, 240), (97, 301), (64, 64), (1000, 10), (9, 900), (33, 32), (1, 1), (500, 333)]
RULES = [((0.5, 1.0), (3 / 4, 4 / 3)), ((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (1.0, 1.0))]


def picture(width, height):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray(((x * 7 + y * 13 + c * 29 + x * y % 31 * 3) % 256).astype(np.uint8))


class Recorder:
    """Notes what torch draws."""

    def __enter__(self):
        self.draws = []
        self.uniform, self.randint = torch.Tensor.uniform_, torch.randint

        def uniform(tensor, *limits, **options):
            drawn = self.uniform(tensor, *limits, **options)
            self.draws.append(drawn.item())
            return drawn

        def randint(*args, **options):
            drawn = self.randint(*args, **options)
            self.draws.append(drawn.item())
            return drawn

        torch.Tensor.uniform_, torch.randint = uniform, randint
        return self

    def __exit__(self, *_):
        torch.Tensor.uniform_, torch.randint = self.uniform, self.randint


def main():
    args = arguments(__doc__)
    torch.manual_seed(0)
    cases = []
    for width, height in SIZES:
        for scale, ratio in RULES:
            image = picture(width, height)
            with Recorder() as recorder:
                y, x, h, w = RandomResizedCrop.get_params(image, list(scale), list(ratio))
            view = torchvision.transforms.functional.resized_crop(
                image, y, x, h, w, [SIDE, SIDE], interpolation=InterpolationMode.BICUBIC
            )
            cases.append(
                {
                    "size": [width, height],
                    "scale": scale,
                    "ratio": ratio,
                    "draws": recorder.draws,
                    "crop": [x, y, w, h],
                    "sha256": hashlib.sha256(np.asarray(view).tobytes()).hexdigest(),
                }
            )
    made_by = versions("torchvision", "torch", "pillow")
    write_json(args, "crops", {"versions": made_by, "side": SIDE, "cases": cases})


if __name__ == "__main__":
    main()
