"""The fleet: which engines there are, how they are connected, and what each of them has a place for."""
