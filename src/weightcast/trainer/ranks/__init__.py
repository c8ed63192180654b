"""Several trainer ranks in one Publisher: rank 0 leads, the others hold their parts and do what it orders.

Ranks meet once over their process group, which carries the address, key and ticket of rank 0's control channel; from then on
they talk over that channel, where a rank that is gone is noticed and every wait has a deadline. Bytes of weights go straight from
each rank to the workers that want them.
"""

from weightcast.trainer.ranks.all_ranks import Ranks
from weightcast.trainer.ranks.choice import GivenGroup, chosen_group
from weightcast.trainer.ranks.coverage import check_complete
from weightcast.trainer.ranks.end import SharedEnd
from weightcast.trainer.ranks.meeting import Meeting
from weightcast.trainer.ranks.other_rank import OtherRank

__all__ = ["OtherRank", "GivenGroup", "Meeting", "Ranks", "SharedEnd", "check_complete", "chosen_group"]
