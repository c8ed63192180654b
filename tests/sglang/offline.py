"""An ``sglang.Engine`` in the trainer's process: what test_sglang_objects.py runs in a process that has imported SGLang."""

import json
import sys
import threading
from pathlib import Path

import torch

from weightcast import Publisher
from weightcast.testing.models import random_state_dict
from weightcast.testing.reference import PROMPTS, Reference, replace

PARAMS = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


def publishes() -> None:
    """Publish to an engine object, twice in each mode, and write down what was seen."""
    import sglang

    model, result = sys.argv[1:]
    folder = Path(model)
    weights = random_state_dict(folder)
    torch.set_num_threads(1)
    seen = []
    engine = sglang.Engine(
        model_path=model, device="cpu", attention_backend="torch_native", disable_cuda_graph=True, dtype="float32",
        mem_fraction_static=0.2, max_total_tokens=4096, max_running_requests=8, context_length=1024, skip_server_warmup=True,
    )  # fmt: skip
    for mode in ("staged", "in_place"):
        with Publisher(weights, [engine], timeout_s=60, mode=mode) as publisher:
            for _ in range(2):
                replace(weights, folder)
                report = publisher.publish()
                answers = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
                seen.append(
                    {
                        "matches": report.digests_match,
                        "version": report.version,
                        "named": [answer["meta_info"]["weight_version"] for answer in answers],
                        "got": [answer["output_ids"] for answer in answers],
                        "wanted": Reference(folder, weights).answers(),
                    }
                )
            # Requests of another thread run the engine's loop while this thread publishes.
            busy = threading.Thread(
                target=engine.generate, kwargs={"input_ids": [7], "sampling_params": {**PARAMS, "max_new_tokens": 200}}
            )
            busy.start()
            seen[-1]["beside"] = publisher.publish().digests_match
            busy.join(60)
    Path(result).write_text(json.dumps(seen))
    engine.shutdown()
