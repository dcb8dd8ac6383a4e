"""The tests of all folders share the fixtures of tests/helpers.py."""

pytest_plugins = ["helpers"]
