"""Execute the notebooks in place and write them byte-stably: the same code on the same machine gives the same file.

    python notebooks/run.py              # all, solutions too; what `make notebooks` runs
    python notebooks/run.py 01 03        # those whose names begin so

Outputs and metadata are stripped first; pictures are reduced to 256 colours, which keeps the files small; the picture
of the cell tagged `thumbnail` becomes thumbnails/NAME.png, shown in README.md, that of `schematic` becomes schematic.png. The line of each notebook that says how to
run it is written from REPOSITORY.
"""
import base64
import io
import re
import sys
import time
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  builds the font cache here, so that no notebook prints about it
import nbformat
from nbclient import NotebookClient
from PIL import Image

REPOSITORY = ""  # OWNER/NAME on GitHub, once it has an address: notebooks then offer Colab
FOLDER = Path(__file__).parent
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}


def strip(notebook):
    """No outputs, no counts, no metadata but tags and the kernel's name."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def how_to_run(path: Path) -> str:
    """The line that says how to run a notebook: on a laptop and, once there is an address, in Colab."""
    place = path.relative_to(FOLDER.parent).as_posix()
    line = f"**Run it:** `make demo` once, then `.venv/bin/jupyter lab {place}`."
    if REPOSITORY:
        line += (f" Or [in Colab](https://colab.research.google.com/github/{REPOSITORY}/blob/main/{place}), with a first cell "
                 f"`!git clone -q https://github.com/{REPOSITORY}` and `%cd {REPOSITORY.split('/')[1]}/{Path(place).parent.as_posix()}`.")
    return line


def png(image: Image.Image) -> bytes:
    """256 colours, no metadata."""
    buffer = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def shrink_pictures(notebook, name: str):
    """Pictures of the outputs to 256 colours; the tagged one to a thumbnail 240 pixels wide as well."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" not in output.get("data", {}):
                continue
            image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            output.data["image/png"] = base64.b64encode(png(image)).decode()
            if "schematic" in cell.metadata.get("tags", []):
                (FOLDER / "schematic.png").write_bytes(png(image))
            if "thumbnail" in cell.metadata.get("tags", []):
                small = image.convert("RGB").resize((240, round(240 * image.height / image.width)), Image.Resampling.LANCZOS)
                (FOLDER / "thumbnails").mkdir(exist_ok=True)
                (FOLDER / "thumbnails" / f"{name}.png").write_bytes(png(small))


def run(path: Path):
    notebook = nbformat.read(path, as_version=4)
    strip(notebook)
    notebook.cells[0].source = re.sub(r"^\*\*Run it:\*\*.*$", lambda match: how_to_run(path), notebook.cells[0].source, flags=re.M)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel wrote its Python version
    shrink_pictures(notebook, path.stem)
    path.write_text(nbformat.writes(notebook) + "\n")
    print(f"{path.relative_to(FOLDER)}: {path.stat().st_size / 1000:.0f} kB, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("**/[0-9]*.ipynb")):
        if not sys.argv[1:] or path.name.startswith(tuple(sys.argv[1:])):
            run(path)
