"""
Runs an example's notebook and writes what its cells print and draw into it:

    python docs/notebooks.py quickstart --model runs/demo/model

Whatever follows the name are the example's own arguments. The cells are those of the script. Needs no Jupyter.
"""

import base64
import contextlib
import io
import sys
from pathlib import Path

import jupytext
import matplotlib
import matplotlib.pyplot as plt
from nbformat import NotebookNode, v4


EXAMPLES = Path(__file__).parents[1] / "examples"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def run(notebook: NotebookNode, arguments: list[str]) -> None:
    """Execute the code cells one after the other in one namespace; what they print and draw becomes their outputs."""
    matplotlib.use("agg")
    plt.close("all")
    names: dict = {"__name__": "__main__"}
    kept, sys.argv = sys.argv, ["notebook", *arguments]
    try:
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for number, cell in enumerate(code, 1):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(cell.source, f"cell {number}", "exec"), names)  # noqa: S102 - the example's own code
            cell.execution_count = number
            cell.outputs = [v4.new_output("stream", name="stdout", text=printed.getvalue())] * bool(printed.getvalue())
            cell.outputs += [drawn(figure) for figure in plt.get_fignums()]
            plt.close("all")
    finally:
        sys.argv = kept


def drawn(figure: int) -> NotebookNode:
    """The output that shows a figure."""
    image = io.BytesIO()
    plt.figure(figure).savefig(image, format="png", dpi=72, bbox_inches="tight")
    return v4.new_output("display_data", data={"image/png": base64.b64encode(image.getvalue()).decode()})


def main(name: str, *arguments: str) -> None:
    notebook = jupytext.read(EXAMPLES / f"{name}.py")
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    # ids that stay the same from run to run
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name.replace('_', '-')}-{number}"
    run(notebook, list(arguments))
    jupytext.write(notebook, EXAMPLES / f"{name}.ipynb")


if __name__ == "__main__":
    main(*sys.argv[1:])
