"""The Space, on its own: `python app.py [MODEL] [--port N] [--host ADDRESS]`. Its code is in `training/space.py`."""

import argparse

from fmrilm.training.cli.options import DEFAULT_MODEL, MODEL_VARIABLE, let_threads_sleep


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask a model about scans, in the browser.")
    parser.add_argument("model", nargs="?", help=f"folder or Hub id; else {MODEL_VARIABLE}, else {DEFAULT_MODEL}")
    parser.add_argument("--port", type=int, help="7860, or the next free one")
    parser.add_argument("--host", help="127.0.0.1; 0.0.0.0 serves other machines, too")
    arguments = parser.parse_args()
    let_threads_sleep()
    from fmrilm.training.space import main

    try:
        main(arguments.model, arguments.port, arguments.host)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
