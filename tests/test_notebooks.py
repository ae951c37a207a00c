"""Every notebook runs in the fast mode, and its committed outputs are complete, in order and free of the machine."""
import base64
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PATHS = re.compile(r"(?<![\w.:/~-])/(?:home|root|tmp|usr|opt|work|mnt|var|srv|Users|private)/\S+|\b[A-Z]:\\\w+")
TIMINGS = re.compile(r"CPU times|[Ww]all time|\bit/s\b|\bs/it\b|\b\d+(?:\.\d+)? ?(?:ms|µs|us|ns|s|sec|seconds?|minutes?)\b")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def texts(cell):
    """What a code cell's outputs say, as text."""
    for output in cell.outputs:
        yield "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))


@each_notebook
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("EESMM_NOTEBOOK_FAST", "1")
    for source in [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *(ROOT / "notebooks").glob("*.ipynb")]:
        place = tmp_path / source.relative_to(ROOT)
        place.parent.mkdir(exist_ok=True)
        shutil.copy(source, place)
    if (ROOT / "results").is_dir():
        shutil.copytree(ROOT / "results", tmp_path / "results")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(tmp_path / "notebooks")}})
    client.execute()  # raises with the cell and its traceback


@each_notebook
def test_committed_outputs_are_complete_and_in_order(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    kinds = [output.output_type for cell in code for output in cell.outputs]
    assert "error" not in kinds
    assert not [cell.id for cell in code for output in cell.outputs if output.get("name") == "stderr"]


@each_notebook
def test_committed_outputs_tell_nothing_of_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert not set(cell.metadata) - {"tags"}, f"{cell.id}: {dict(cell.metadata)}"
        for text in texts(cell) if cell.cell_type == "code" else ():
            for pattern in (PATHS, TIMINGS):
                assert not pattern.search(text), f"{cell.id}: {pattern.search(text)[0]!r}"
    assert notebook.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                                 "language_info": {"name": "python"}}, "run `make notebooks`"
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            picture = base64.b64decode(output.get("data", {}).get("image/png", ""))
            assert not any(chunk in picture for chunk in (b"tEXt", b"iTXt", b"tIME")), f"{cell.id}: PNG metadata"


@each_notebook
def test_small_and_written_by_the_runner(path):
    assert path.stat().st_size < 700_000
    assert path.read_text() == nbformat.writes(nbformat.read(path, as_version=4)) + "\n", "run `make notebooks`"
    ids = [cell["id"] for cell in json.loads(path.read_text())["cells"]]
    assert len(set(ids)) == len(ids)


def test_readme_shows_every_notebook():
    readme = (ROOT / "notebooks" / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"({path.name})" in readme
    for name in re.findall(r'src="(thumbnails/[^"]+)"', readme):
        assert (ROOT / "notebooks" / name).stat().st_size < 40_000
