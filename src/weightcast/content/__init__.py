"""Content: the digest of what lies in a memory, on whichever device, and of what workers hold of each tensor."""
