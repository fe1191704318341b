"""Writes the API reference out of the docstrings as HTML: python docs/reference.py FOLDER"""

import sys
from importlib import import_module
from pathlib import Path

import pdoc


PACKAGES = ("fmrilm", "fmrilm.processors", "fmrilm.training")


def write_reference(folder: Path) -> None:
    for package in map(import_module, PACKAGES[:2]):
        # pdoc does not see names that are imported when they are first used
        vars(package).update({name: getattr(package, name) for name in package.__all__})
    pdoc.render.configure(docformat="google", footer_text="fMRI-LM")
    pdoc.pdoc(*PACKAGES, output_directory=folder)


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
