"""The GPU harness: the catalogue with random weights, run case by case on a card, measured beside what is predicted.

`python -m bench.gpu run` measures, `report` compares, `list` shows what there is to measure, `pack` writes a folder to
carry to a machine with a card. docs/benchmarks.md tells how. What is measured is appended to a file of JSON Lines.
"""
