"""How the experts of `moe` are computed fast: one lean autograd function and its kernels."""
