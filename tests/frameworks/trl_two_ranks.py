"""Two processes under torchrun, each a rank of TRL's GRPO trainer: URL TOKEN MODEL FOLDER. Used by test_trl.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tests.frameworks.served import Served
from tests.frameworks.trl_runs import GROUP, PROMPTS, After, grpo, rollouts

from weightcast.integrations.trl import PublishCallback, use_in_server_mode


def main() -> None:
    url, token, model, folder = sys.argv[1:]
    served = Served(url, token, Path(model), Path(folder))

    def look(policy: Any) -> None:
        if dist.get_rank() == 0:
            served.holds_model(policy)
        dist.barrier()

    half = {"per_device_train_batch_size": len(PROMPTS) * GROUP // 2}
    callbacks = [PublishCallback([url], token=token), After(look)]
    grpo(served, Path(folder) / "run", callbacks=callbacks, rollout_func=rollouts(served), **half).train()
    callback = len(set(served.versions))
    use_in_server_mode(token=token)
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, **half}
    trainer = grpo(served, Path(folder) / "run2", callbacks=[], **server)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    look(trainer.model)
    if dist.get_rank() == 0:
        trainer.vllm_generation.vllm_client.close_communicator()
        print(f"versions {callback} {len(set(served.versions))}")


if __name__ == "__main__":
    main()
