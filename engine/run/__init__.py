"""The torch edge: load a pipeline as planned, apply and verify the optimizers, generate, write.

Only `engine.plan`'s four doors and the command line lead here.
"""
