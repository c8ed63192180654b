"""weightcast syncs freshly trained LLM weights from an RL trainer into running inference engines.

with Publisher(model, engines=["http://127.0.0.1:8000"], token=token) as publisher:
    publisher.connect()
    report = publisher.publish()
"""

from weightcast import errors
from weightcast.report.model import Report
from weightcast.trainer.publisher import Publisher
from weightcast.weight_transfer.config import WeightTransferConfig

__version__ = "0.1.0"

__all__ = ["Publisher", "Report", "WeightTransferConfig", "__version__", "errors"]
