"""Run the notebooks and write them with their pictures: `make notebooks`, or `python notebooks/render.py [NAME ...]`."""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from mmdit.utils import write_text

HERE = Path(__file__).parent
SETTINGS = "import matplotlib\nmatplotlib.rcParams['figure.dpi'] = 110\n"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def render(source: Path) -> Path:
    """Run one, from top to bottom; the result replaces the one that was there once it is whole."""
    notebook = jupytext.read(source)
    settings = nbformat.v4.new_code_cell(SETTINGS, metadata={"tags": ["settings"]})
    notebook.cells.insert(0, settings)
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # no bars and hints among the pictures
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    notebook.cells.remove(settings)
    notebook.metadata["kernelspec"] = KERNEL
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", "](../../")  # the result lies one folder deeper
    if noise := [output for cell in notebook.cells for output in cell.get("outputs", ()) if _is_noise(output)]:
        raise RuntimeError(f"{source.name} leaves {len(noise)} outputs that no reader wants, such as {noise[0]}")
    target = HERE / "rendered" / f"{source.stem}.ipynb"
    write_text(target, nbformat.writes(notebook) + "\n")
    return target


def _is_noise(output: nbformat.NotebookNode) -> bool:
    """Progress bars, warnings, and values that show themselves as text: a cell prints what it has to say."""
    stray = output.output_type == "execute_result" and "image/png" not in output.data
    return output.get("name") == "stderr" or stray


if __name__ == "__main__":
    wanted = sys.argv[1:]
    for path in sorted(HERE.glob("[0-9]*.py")):
        if not wanted or path.stem in wanted:
            print(f"wrote {render(path)}", flush=True)
