"""Continual methods: each is written once against parameters, losses and batches, and composes with any agent.

:mod:`~clbench.agents.continual.method` says what a method is, :mod:`~clbench.agents.continual.compose` how methods and an
agent become one agent. One method, one file.
"""
