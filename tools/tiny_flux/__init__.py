"""Build the embedded pipeline from nothing: draw scenes, train a VAE and a FLUX transformer, judge the result.

`python -m tools.tiny_flux --help` is the command; `docs/embedded-model.md` says what it takes and what came out.
"""
