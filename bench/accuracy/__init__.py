"""How true predictions are: `python -m bench.accuracy [--write | --check]`, and docs/accuracy.md.

Predictions are made anew; what they are held against lies in the repository: published figures (bench/data/), what was
executed on the counted device and by torch's CUDA build without a card (truth/results/), what was measured on GPUs
(bench/gpu/results/).
"""
