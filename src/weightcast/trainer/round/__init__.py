"""One attempt to bring engines to a version: begin, transfer, verify, commit, or undo."""
