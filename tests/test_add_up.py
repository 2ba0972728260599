"""Several backwards of one forward are one backward of the sum:
gradients and the running gradient, in every path"""
import shutil
from copy import deepcopy
import pytest,torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from fastai_runbn.layers import RecentBatches,RunningBatchNorm2d
from impls import backends

compiler = shutil.which('g++') or shutil.which('clang++')
needs_compiler = pytest.mark.skipif(not compiler, reason='Inductor needs a C++ compiler')
bounds = {torch.float32:1e-6, torch.float64:1e-12}

def net(backend='auto', dtype=torch.float64, **settings):
    torch.manual_seed(0)
    def norm(): return RunningBatchNorm2d(6, backend=backend, **settings)
    def block(c):
        return nn.Conv2d(c,6,3),norm(),nn.ReLU()
    body = *block(3),*block(6)
    head = nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(6,3)
    return nn.Sequential(*body, *head).to(dtype)

def losses(out):
    "Three parts of a loss, of three of the outputs"
    a,b,c = (out[:,i] for i in range(3))
    return (a.square().mean(),
        (b-1).abs().mean(),
        (c**3).mean())

def backwards(ls):
    for l in ls: l.backward(retain_graph=l is not ls[-1])
def grads_of_tasks(ls, params):
    "As PCGrad takes them: a gradient a task, and then their sum"
    each = [torch.autograd.grad(l, params, retain_graph=l is not ls[-1])
        for l in ls]
    for p,*gs in zip(params, *each): p.grad = sum(gs)

def vector(m): return torch.cat([p.grad.flatten() for p in m.parameters()])
def running(m):
    norms = [n for n in m.modules() if isinstance(n, RunningBatchNorm2d)]
    return torch.cat([n.window_grad.flatten() for n in norms])
def off(a, b):
    "Relative distance; 0 where both are the same, zero or not"
    if torch.equal(a, b): return 0.
    return ((a-b).norm()/b.norm()).item()
def off_gradients(several, once):
    "How far gradients and running gradients are from those of the other"
    return (off(vector(several), vector(once)),
        off(running(several), running(once)))

def check(make, forward=lambda m, x: m(x), steps=60,
    dtype=torch.float64, how='two', bs=2):
    "`steps` of twins: one has several backwards, the other one of the sum"
    several,once = make(),make()
    once.load_state_dict(several.state_dict())
    worst = []
    for _ in range(steps):
        x = torch.randn(bs,3,9,9, dtype=dtype)
        ls = losses(forward(several, x))
        whole = losses(forward(once, x))
        n = 3 if how=='three' else 2
        for m in (several,once): m.zero_grad()
        if how=='tasks':
            grads_of_tasks(ls[:n], list(several.parameters()))
        else: backwards(ls[:n])
        sum(whole[:n]).backward()
        worst += off_gradients(several, once)
    assert all(off<bounds[dtype] for off in worst), max(worst)

@pytest.mark.parametrize('dtype', bounds, ids=str)
@pytest.mark.parametrize('how', ['two','three','tasks'])
@pytest.mark.parametrize('backend', backends)
def test_several_backwards(backend, how, dtype):
    check(lambda: net(backend, dtype), how=how, dtype=dtype)

@pytest.mark.parametrize('settings',
    [dict(running_grad=.5), dict(running_grad=0.),
    dict(clamp=[9.]*200), dict(window=3)], ids=str)
def test_with_other_settings(settings): check(lambda: net(**settings), how='three')

def forward_checkpointed(reentrant):
    "A forward whose first five layers are checkpointed"
    def forward(m, x):
        start = checkpoint(m[:5], x.requires_grad_(), use_reentrant=reentrant)
        return m[5:](start)
    return forward

@pytest.mark.parametrize('reentrant', [True,False], ids=['reentrant','not reentrant'])
@pytest.mark.parametrize('how', ['two','three'])
def test_checkpointed(how, reentrant):
    check(net, forward_checkpointed(reentrant), how=how)

def test_a_debt_that_is_found_again_on_the_device(monkeypatch):
    "As on a GPU, where no one looks which of the last forwards is the one that is done again"
    monkeypatch.setattr(RecentBatches, 'looks', False)
    check(net, forward_checkpointed(True), how='three', steps=20)

@needs_compiler
def test_compiled_as_a_whole():
    "Two backwards take a graph that keeps its memory: PyTorch says which switch, where it does not"
    torch._dynamo.reset()
    compiled = {}
    def forward(m, x):
        if m not in compiled: compiled[m] = torch.compile(m)
        return compiled[m](x)
    donated = torch._functorch.config.patch(donated_buffer=False)
    with donated: check(net, forward)

def test_part_of_the_outputs():
    "Each sample's loss by itself, in any order"
    several,once = net(),net()
    for _ in range(20):
        x = torch.randn(4,3,9,9).double()
        for m in (several,once): m.zero_grad()
        out,whole = several(x),once(x)
        for i in (2,0,3,1):
            out[i].square().sum().backward(retain_graph=True)
        whole.square().sum().backward()
        assert all(o<1e-12 for o in off_gradients(several, once))

def test_forwards_and_backwards_in_any_order():
    "Debts are of forwards: three of them, each with two backwards, mixed"
    m = RunningBatchNorm2d(3, dtype=torch.float64)
    def batch(): return torch.randn(2,3,5,5).double().requires_grad_()
    for _ in range(9):
        (m(batch())**3).sum().backward()
    xs = [batch() for _ in range(3)]
    ys = [m(x) for x in xs]
    left = m.window_grad.clone()
    rhos = [y.grad_fn.saved[2] for y in ys]
    def g(y):
        terms = 3*y**2,3*y**3
        sums = [o.sum((0,2,3)) for o in terms]
        return torch.stack(sums).detach()/50
    order = ((1,True),(0,True),(1,False),
        (2,True),(0,False),(2,False))
    for k,first in order:
        (ys[k]**3).sum().backward(retain_graph=True)
        kept = 1-rhos[k] if first else 1
        left = left*kept+rhos[k]*g(ys[k])
        torch.testing.assert_close(m.window_grad, left, rtol=1e-12, atol=1e-12)

def test_a_forward_without_a_backward_adds_nothing():
    m = RunningBatchNorm2d(3)
    x = torch.randn(2,3,5,5).requires_grad_()
    (m(x)**3).sum().backward()
    before = m.window_grad.clone()
    for _ in range(5): m(torch.randn(2,3,5,5))
    assert torch.equal(m.window_grad, before)

@needs_compiler
def test_compiled_forwards_before_their_backwards():
    """The running term is of the running gradient as it is in the backward,
    not as it was in the forward"""
    torch._dynamo.reset()
    eager = net()
    twin = deepcopy(eager)
    compiled = torch.compile(twin)
    for _ in range(5):
        xs = [torch.randn(2,3,9,9).double() for _ in range(3)]
        for m,f in ((eager,eager), (twin,compiled)):
            m.zero_grad()
            ls = [f(x).square().sum() for x in xs]
            for l in ls: l.backward()
        assert all(o<1e-9 for o in off_gradients(twin, eager))
