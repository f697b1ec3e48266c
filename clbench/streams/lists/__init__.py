"""Frozen evaluation lists, as versioned JSON."""
