"""One commit: the order of its steps, who carries them out, and how an engine is asked for each of them.

Every client of a trainer and every front of an engine goes through here, so a commit means the same whichever way an engine is reached.
"""
