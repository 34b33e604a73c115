"""Benchmarks: the norm operators beside their peers, measured interleaved in the same run.

Needs the extra ``bench``: ``pip install 'layernorm[bench]'``.
"""
