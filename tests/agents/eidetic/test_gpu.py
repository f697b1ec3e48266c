"""The same bits on a GPU: repeatability first, then every later train, prune and commit step, in fp32, TF32 and bf16."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from clbench.agents.networks.eidetic.policy import EideticPolicy
from clbench.agents.networks.eidetic.verify import observe, same, verify
from clbench.agents.networks.encoders import Parts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PRECISIONS = ("fp32", "tf32", "bf16")


@pytest.fixture(params=PRECISIONS)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = request.param == "tf32"
    torch.backends.cudnn.benchmark = False  # which kernel is fastest must not decide about bits
    yield torch.bfloat16 if request.param == "bf16" else torch.float32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def network(norm: str, image: bool, dtype: torch.dtype) -> EideticPolicy:
    space = Box(0, 255, (3, 32, 32), np.uint8) if image else Box(-1, 1, (64,), np.float32)
    return EideticPolicy(Parts(space), 10, (256, 256, 256), norm=norm).to("cuda", dtype)  # type: ignore[arg-type]


def probe(image: bool, batch: int, dtype: torch.dtype) -> Tensor:
    shape = (batch, 3, 32, 32) if image else (batch, 64)
    return torch.rand(shape, generator=torch.Generator().manual_seed(batch)).to("cuda", dtype)


@pytest.mark.parametrize("image", [False, True], ids=["mlp", "cnn"])
@pytest.mark.parametrize("norm", ["none", "batch", "prefix"])
def test_old_outputs_are_bitwise_equal_after_every_later_step(norm: str, image: bool, dtype: torch.dtype) -> None:
    net, rng = network(norm, image, dtype), torch.Generator("cuda").manual_seed(0)
    seen: dict[tuple[int, int], object] = {}
    optimizer = None

    def unchanged() -> None:
        for (k, batch), before in seen.items():
            assert same(before, observe(net, [probe(image, batch, dtype)], k)), f"task {k}, batch {batch}"

    for task in range(4):
        net.begin_task(rng)
        if optimizer is None:
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)
        else:
            optimizer.add_param_group({"params": list(net.head.layers[task].parameters())})
        x, y = probe(image, 128, dtype), torch.randint(10, (128,), generator=rng, device="cuda")
        for step in range(12):
            net.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x, task=task).float(), y).backward()
            optimizer.step()
            if step % 4 == 3:
                for space in net.prunable().values():
                    space.kill((torch.rand(space.size, generator=rng, device="cuda") < 0.4) & space.free)
                unchanged()
        net.commit([probe(image, 64, dtype)])
        unchanged()
        for batch in (1, 7, 256):
            first, again = (observe(net, [probe(image, batch, dtype)], task) for _ in range(2))
            assert same(first, again), "two passes of the same network differ: nothing can be said"
            seen[task, batch] = first
    evidence = verify(net)
    assert evidence.status == {"L0": "pass", "L1": "pass", "L2": "pass", "L3": "pass", "L4": "pass"}, evidence.details


def test_negative_control_a_changed_weight_is_noticed(dtype: torch.dtype) -> None:
    net, rng = network("none", False, dtype), torch.Generator("cuda").manual_seed(0)
    net.begin_task(rng)
    net.commit([probe(False, 64, dtype)])
    before = observe(net, [probe(False, 7, dtype)], 0)
    with torch.no_grad():
        net.layers[0].weight.store.mul_(1.01)
    assert not same(before, observe(net, [probe(False, 7, dtype)], 0)) and not verify(net).ok
