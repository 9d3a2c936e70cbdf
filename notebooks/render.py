"""Run the notebooks and write them with their pictures: `make notebooks`, or `python notebooks/render.py [NAME ...]`."""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
FIGURES = "import matplotlib\nmatplotlib.rcParams['figure.dpi'] = 70\n"


def render(source: Path) -> Path:
    """Run one, from top to bottom; the result replaces the one that was there once it is whole."""
    notebook = jupytext.read(source)
    settings = nbformat.v4.new_code_cell(FIGURES, metadata={"tags": ["settings"]})
    notebook.cells.insert(0, settings)
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # no bars and hints among the pictures
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    notebook.cells.remove(settings)
    target = HERE / "rendered" / f"{source.stem}.ipynb"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".partial")
    nbformat.write(notebook, partial)
    return partial.replace(target)


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for path in sorted(HERE.glob("[0-9]*.py")):
        if not wanted or path.stem in wanted:
            print(f"wrote {render(path)}", flush=True)
