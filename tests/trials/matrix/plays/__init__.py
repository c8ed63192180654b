"""Plays: each injects one fault into a Field, checks what must be true and says what came of it."""
