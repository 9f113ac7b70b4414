"""The fused layers are the network, by Triton's interpreter: logits, gradients and statistics against float64."""
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
import copy
import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from robust_jem.ebm.energy import frozen_statistics
from robust_jem.networks.fused import can_fuse, fused_forward
from robust_jem.networks.wide_resnet import WideResNet

def check(mode, depth, width, statistics):
    training, tracked = mode == "train", statistics == "tracked"
    torch.manual_seed(1)         # no pre-activation so near 0 that float32 and float64 see different signs
    net = WideResNet(depth, width, num_classes=5).to(memory_format=torch.channels_last)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            torch.nn.init.normal_(m.bias)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    exact = copy.deepcopy(net).double()
    assert can_fuse(net, torch.device("cpu")) is None
    for m in (net, exact):
        m.train(training)
    x, y = torch.rand(6, 3, 8, 8) * 2 - 1, torch.arange(6) % 5

    def run(forward, x):
        x = x.clone().requires_grad_()
        logits = forward(x)
        loss = F.cross_entropy(logits, y) - 0.1 * logits.logsumexp(1).mean()
        loss.backward()
        return logits, x.grad

    def near(p, q, tol=2e-4):
        torch.testing.assert_close(p.double(), q, rtol=tol, atol=tol * float(q.abs().max()) + 1e-9)

    with nullcontext() if tracked else frozen_statistics(exact):
        a = run(exact, x.double())
    with nullcontext() if tracked else frozen_statistics(net):
        b = run(lambda x: fused_forward(net, x, torch.float32), x)
    near(b[0], a[0])
    near(b[1], a[1])
    largest = float(max(g.grad.abs().max() for g in exact.parameters()))
    for (name, p), q in zip(net.named_parameters(), exact.parameters()):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-4 * largest, msg=name)
    for p, q in zip(net.buffers(), exact.buffers()):
        if p.is_floating_point():
            near(p, q.double())
        else:
            torch.testing.assert_close(p, q)
    net.zero_grad()

    def in_bfloat16(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    def deviation(logits, gradient):
        return float((gradient - a[1]).norm() / a[1].norm())

    fused, plain = deviation(*run(lambda x: fused_forward(net, x, torch.bfloat16), x)), deviation(*run(in_bfloat16, x))
    print(f"bfloat16: the gradient is off by {fused:.3f}, that of the network itself by {plain:.3f}")
    assert fused < max(0.1, 1.25 * plain)

for case in sys.argv[1:]:
    mode, depth, width, statistics = case.split()
    print(f"{case}: ", end="")
    check(mode, int(depth), int(width), statistics)
    print("right", flush=True)
"""
# mode, depth, width, statistics; at depth 16 every second block has no projection, at width 5 a layer has many tiles
CASES = ("train 16 1 tracked", "train 16 2 frozen", "train 10 5 tracked", "eval 16 1 tracked")


def test_fused_layers_are_the_network():
    "In another process: the interpreter must be chosen before Triton is imported."
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK, *CASES], capture_output=True, text=True, timeout=600,
                          env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("right") == len(CASES)
