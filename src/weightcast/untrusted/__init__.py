"""What comes from outside of this process, checked and made fit for use: bytes and texts of peers, files, plug-ins, tokens."""
