"""The dry run: a pipeline's real `__call__` on meta tensors, every storage followed. It needs no weights and no card.

This is behind the torch edge; what it records (`engine.trace`) is a plain value, which is replayed without torch.
"""
