"""Make a folder of crops of scikit-image's photographs, for the large picture in README.md.

    python experiments/photographs.py FOLDER

Fifteen photographs make FOLDER/train. The astronaut and the cat, which the picture shows, are only in FOLDER/val.
results/demo/README.md has the commands that follow.
"""

import argparse
import sys
from pathlib import Path

import skimage.data
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from images.decode import open_image, to_rgb

PHOTOGRAPHS = {
    "train": "brick.png camera.png cell.png clock_motion.png coffee.png coins.png grass.png gravel.png "
    "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png motorcycle_right.png retina.jpg rocket.jpg",
    "val": "astronaut.png chelsea.png",
}
SIDE = 160  # of a crop, in pixels
STRIDE = 40  # between crops, in pixels
SHORT_SIDES = (160, 240, 360)  # that a photograph is resized to, in pixels


def write(folder: Path) -> int:
    """Write crops of every photograph at every size, as PNG. Returns their number."""
    count = 0
    for split, names in PHOTOGRAPHS.items():
        for name in names.split():
            crops = folder / split / name.split(".")[0]
            crops.mkdir(parents=True, exist_ok=True)
            photograph = to_rgb(open_image(Path(skimage.data.__file__).parent / name))
            for short_side in SHORT_SIDES:
                factor = short_side / min(photograph.size)
                size = round(photograph.width * factor), round(photograph.height * factor)
                resized = photograph.resize(size, Image.Resampling.BICUBIC)
                for top in range(0, resized.height - SIDE + 1, STRIDE):
                    for left in range(0, resized.width - SIDE + 1, STRIDE):
                        crop = resized.crop((left, top, left + SIDE, top + SIDE))
                        crop.save(crops / f"{short_side}_{top}_{left}.png")
                        count += 1
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(f"{write(args.folder)} crops in {args.folder}")
