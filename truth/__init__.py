"""Witnesses of what planning predicts: the libraries' own code, executed where every byte is counted.

Not part of the package that users install.
"""
