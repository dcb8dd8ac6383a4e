"""Processes, errors and files: what every script stands on."""
