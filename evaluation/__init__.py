"""What evaluate.py is made of: image sets, features, metrics, generation, and the protocol."""
