"""From a trace to what a run takes: bytes on the card and the host, and seconds. No torch.

trace       what a dry run records          placements  which weights move when, under each placement
tracefile   it as bytes                     stream      what the device's allocator is asked for, in order
allocator   what it reserves for that       workspaces  what CUDA's libraries take beside tensors
pinned      the host's allocator            clock       how long it takes
whole       all of it, as one estimate      store       traces and estimates on disk
ways        which way through the VAE a list of steps takes
between     an estimate between two others, or within a budget
estimator   estimates for one request
"""
