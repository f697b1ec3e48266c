"""The command line: ``clbench run | report | list | bench | check``."""
