"""What exists only to be fast on a CPU: memory, threads, products. It imports nothing of ours."""
