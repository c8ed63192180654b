"""The trainer's side where nothing of weightcast[server] is installed, or another transformers than the embedded engine wants, as beside verl."""

import subprocess
import sys

CODE = """
import sys
absent = ("transformers", "tokenizers", "jinja2", "starlette", "uvicorn", "accelerate", "peft", "trl", "ray")
sys.modules.update(dict.fromkeys(absent))  # none of them can be imported
import torch
import weightcast.cli.doctor, weightcast.cli.push, weightcast.cli.report, weightcast.cli.status, weightcast.cli.verify, weightcast.cli.watch
import weightcast.integrations.deepspeed, weightcast.trainer.clients
from weightcast import Publisher, StreamSource
from weightcast.testing.local_engine import DictModel, LocalEngine

module = torch.nn.Linear(5, 3)
named = dict(module.named_parameters())
form = [(name, value.dtype, value.shape) for name, value in named.items()]
sources = [
    (module, False),
    (lambda: named.items(), False),
    (StreamSource(metadata=form), True),
]
for source, is_given in sources:
    live = DictModel({name: torch.zeros_like(value) for name, value in named.items()})
    with Publisher(source, [LocalEngine("engine", [live])]) as publisher:
        for _ in range(2):
            with torch.no_grad():
                for value in named.values():
                    value.copy_(torch.randn_like(value))
            publisher.publish(iter(named.items())) if is_given else publisher.publish()
            assert live.holds({name: value.detach() for name, value in named.items()})
print("published")
"""


def test_a_publisher_does_without_transformers() -> None:
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=110, check=False)
    assert ran.stdout == "published\n", ran.stderr[-3000:]
