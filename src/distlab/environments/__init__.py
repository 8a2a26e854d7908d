"""The lab's virtual environments: what goes into each, how it is built, locked and kept.

Python's standard library only, since scripts/lab.py uses this where nothing is installed yet.
"""
