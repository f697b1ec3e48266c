"""Building blocks that agents share, initialised from the generator they are given, never from a global one."""
