"""Speed of the parts; `python -m benchmarks` runs them.

A package of its own: opacus installs one of this name, which would stand before a folder without this file.
"""
