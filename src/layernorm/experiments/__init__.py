"""Experiments that train the same network with different norms, and the runner that compares them.

Needs the extra ``experiments``: ``pip install 'layernorm[experiments]'``.
"""
