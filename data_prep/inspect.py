"""Entry point of data_prep/inspect_dataset.py, under the name `python -m data_prep.inspect`.

The file shadows the standard library's inspect for whoever has this folder first on sys.path; then it is not run.
"""

import sys

if __name__ == "__main__":
    import os.path  # loaded at start-up: cannot be shadowed

    _folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != _folder]
    sys.path.insert(0, os.path.dirname(_folder))

    from data_prep import inspect_dataset
    from pipeline import cli

    cli.run(inspect_dataset.main, inspect_dataset.InspectConfig, config="inspect", positional=["dataset"])
