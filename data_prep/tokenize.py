#!/usr/bin/env python
"""Entry point of tokenize_job.py, which has the code and the documentation.

This file's name is the standard library's: run as a script, Python puts this folder first in
sys.path, and every `import tokenize` (inspect, torch, linecache, ...) would find this file. So the
folder leaves the path before anything else is imported; in worker processes too, which import this
file as __mp_main__.
"""

import sys

if __name__ in ("__main__", "__mp_main__"):
    import os.path  # in memory since Python started: cannot be shadowed

    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != _here]
    sys.path.insert(0, os.path.dirname(_here))

if __name__ == "__main__":
    from data_prep.tokens.tokenize_job import run

    run()
