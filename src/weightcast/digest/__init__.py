"""Digests: one 64-bit number that proves the content of a model, by a formula that adds over disjoint parts."""
