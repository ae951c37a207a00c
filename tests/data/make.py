"""Run in an empty folder with the flat files of commit c25f397 on the path: PYTHONPATH=OLD python make.py"""

import os
import shutil
import sys

import chance
import numpy as np
import torch
from PIL import Image

import swin
import train


def toy(**overrides):
    return swin.Swin(**dict(image_size=32, patch=2, window=4, width=16, depths=(2, 2), heads=(1, 2)) | overrides)


swin.MODELS["toy"] = toy
torch.set_num_threads(1)
rng = np.random.default_rng(0)
os.makedirs("images")
for k in range(60):
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(f"images/{k:02}.png")
words = (
    "--data images --in-memory --recipe small --model toy --image-size 32 --window 4 --decoder-width 32 "
    "--drop-path 0.1 --layer-decay 0.9 --masks independent "
    "--batch-size 8 --epochs 3 --base-lr 0.1 --warmup-epochs 0.5 --log-every 1 --workers 0 --device cpu --output run"
).split()
sys.argv = ["train.py", *words]
train.main([*words, "--max-steps", "3"])
shutil.copy("run/last.pt", "step3.pt")
train.main([*words, "--max-steps", "9", "--resume", "auto"])
saved = torch.load("run/last.pt", weights_only=True)
model = train.make_model(train.arguments(words))
masks = torch.stack([model.draw(chance.generator(0, "mask", step)).visible for step in range(9)])
torch.save({"model": saved["model"], "masks": masks}, "step9.pt")
shutil.copy("run/log.jsonl", "step9.jsonl")
