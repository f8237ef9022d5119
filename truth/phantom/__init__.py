"""A phantom CUDA device: torch's CUDA build runs on it, without a card. What it allocates is executed, not modelled.

`csrc/` plays CUDA's runtime, driver and libraries. Memory of the device is addresses that nobody touches, so that a
model of 33 GiB takes none; kernels do nothing; small copies are real, large ones touch nothing; a card's properties and
capacity are what an environment variable says. Everything else is the real thing: PyTorch's caching allocator, the host
code of its CUDA operators with their temporaries, its choice of attention kernels, the hooks of diffusers and
accelerate on streams and pinned memory. So `torch.cuda.max_memory_allocated()` is a figure to hold predictions against.

What it cannot witness: what CUDA's own libraries want (cuDNN's workspaces are taken to be nothing, on both sides of the
comparison), the CUDA context, time, and values. What a pipeline reads of the device it is told from the dry run.

It needs torch's CUDA 13 build in the environment, a C compiler with binutils, and the headers of a CUDA 13 toolkit:

    python -m truth.phantom allocator --count 3000
    python -m truth.phantom tiny --placements resident,model --dtypes bfloat16
    python -m truth.phantom catalogue --models black-forest-labs/FLUX.1-dev --out results.jsonl

Each prints one JSON object a line: what was predicted and what was executed, and the versions. What is played is chosen
by `DG_PHANTOM_CARD` (T4, A100, 4090, H100), `DG_PHANTOM_BYTES` (capacity), `DG_PHANTOM_ADDRESSES` (ascending, lowest)
and `DG_PHANTOM_TELL` (which kernels are launched, on stderr).
"""
