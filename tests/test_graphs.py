"""Recorded functions on a GPU: the same results as unrecorded ones, with new weights and other shapes.

Without a GPU: refused in one line."""
import pytest
import torch

from robust_jem.core.errors import InputError
from robust_jem.ebm.attacks import pgd
from robust_jem.engine.graphs import Captured
from robust_jem.engine.runtime import choose_policy
from robust_jem.networks.fused import can_fuse
from robust_jem.networks.wide_resnet import WideResNet

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.gpu
def test_recorded_function_sees_new_weights_and_other_shapes():
    layer = torch.nn.Linear(4, 3).cuda()

    def work(x):
        with torch.no_grad():
            return layer(x)

    recorded = Captured(work)
    for size in (2, 5, 2):
        for _ in range(5):
            x = torch.randn(size, 4, device="cuda")
            with torch.no_grad():
                layer.weight.add_(1)
            assert torch.allclose(recorded(x), work(x))


@gpu
@pytest.mark.gpu
def test_fused_network_attacks_like_the_network_itself():
    torch.manual_seed(0)
    net = WideResNet(16, 2).cuda().eval()
    fast = choose_policy(torch.device("cuda"), "bfloat16", "fused").accelerate(net)
    x = torch.rand(64, 3, 32, 32, device="cuda") * 2 - 1
    y = torch.arange(64, device="cuda") % 10
    with torch.no_grad():
        assert (fast(x) - net(x)).abs().max() < 0.05 * net(x).abs().max()
    ours, theirs = (pgd(m, x, y, 0.1, 5, random_start=False) for m in (fast, net))
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        assert abs(loss(net(ours), y) - loss(net(theirs), y)) < 0.1 * (loss(net(theirs), y) - loss(net(x), y)).abs()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_fused_layers_are_refused_without_a_gpu():
    net = WideResNet(10, 1)
    reason = can_fuse(net, torch.device("cpu"))
    assert reason is not None
    with pytest.raises(InputError, match="compile: 'fused' can't be used"):
        choose_policy(torch.device("cpu"), "float32", "fused").accelerate(net)


def test_fused_layers_name_what_they_lack(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "batch norm only" in can_fuse(WideResNet(10, 1, norm="group"), torch.device("cpu"))
    assert "Wide-ResNets" in can_fuse(torch.nn.Linear(2, 2), torch.device("cpu"))
