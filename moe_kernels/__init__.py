"""Fast computation of the experts of `moe`: one memory-saving autograd function and its kernels."""
