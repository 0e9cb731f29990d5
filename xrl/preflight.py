"""Checks."""


def preflight(settings, *, world_size):
    pass
