"""Scikit-image's photographs as a folder of crops, for the large picture in README.md: results/demo/README.md has the commands.

    python experiments/photographs.py FOLDER

Fifteen photographs make FOLDER/train; the astronaut and the cat, which the picture shows, are held out whole in FOLDER/val.
"""

import argparse
import sys
from pathlib import Path

import skimage.data
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from images.decode import open_image, to_rgb

PARTS = {
    "train": (
        "brick.png",
        "camera.png",
        "cell.png",
        "clock_motion.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "val": ("astronaut.png", "chelsea.png"),
}
SIDE, STEP, HEIGHTS = (
    160,
    40,
    (160, 240, 360),
)  # px of a crop, between crops, and the shorter sides that a photograph is scaled to


def write(folder: Path) -> int:
    """Crops of every photograph at every scale, as PNG. Returns how many."""
    count = 0
    for part, names in PARTS.items():
        for name in names:
            place = folder / part / name.split(".")[0]
            place.mkdir(parents=True, exist_ok=True)
            photograph = to_rgb(open_image(Path(skimage.data.__file__).parent / name))
            for height in HEIGHTS:
                factor = height / min(photograph.size)
                scaled = photograph.resize(
                    (round(photograph.width * factor), round(photograph.height * factor)), Image.Resampling.BICUBIC
                )
                for top in range(0, scaled.height - SIDE + 1, STEP):
                    for left in range(0, scaled.width - SIDE + 1, STEP):
                        scaled.crop((left, top, left + SIDE, top + SIDE)).save(place / f"{height}_{top}_{left}.png")
                        count += 1
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Crops of scikit-image's photographs, as train/ and val/.")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(f"{write(args.folder)} crops in {args.folder}")
