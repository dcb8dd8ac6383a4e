"""The stages of check_gpu.py, and the report that they fill."""
