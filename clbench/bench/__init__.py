"""Benchmarks: speeds beside the limit of the hardware, measured in the same process."""
