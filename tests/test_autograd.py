"Backward in every order that a training loop may ask for; activation checkpointing; torch.func"
from copy import deepcopy
import pytest,torch
from torch import nn
from torch.func import functional_call,grad,vmap
from torch.utils.checkpoint import checkpoint,checkpoint_sequential
from torchvision.models import resnet18
from fastai_runbn.layers import LESSON10,RunningBatchNorm2d
from fastai_runbn.surgery import to_runbn

def data(*shape): return torch.randn(shape or (2,3,4,4)).double()
def layer(**settings): return RunningBatchNorm2d(3, dtype=torch.float64, **settings)
def cubed(y):
    "A loss that is not linear in the output"
    return (y**3).sum()
def warm(l, steps=3):
    for _ in range(steps):
        cubed(l(data().requires_grad_())).backward()
    l.zero_grad()
    return l
def twins(l):
    "`l` and a copy of it"
    return l,deepcopy(l)
def leaf(x):
    "A copy of `x` that takes a gradient of its own"
    return x.detach().clone().requires_grad_()
def same(a, b): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

both = pytest.mark.parametrize('settings',
    [{}, LESSON10, dict(running_grad=1.)], ids=['default','lesson10','running_grad 1'])
either = pytest.mark.parametrize('reentrant',
    [True,False], ids=['reentrant','not reentrant'])

@both
@pytest.mark.parametrize('n', [2,3,7])
def test_forwards_before_the_first_backward(n, settings):
    """Each backward uses its own forward's statistics;
    the running gradient moves in the order of the backwards"""
    a,b = twins(warm(layer(**settings)))
    xs = [data().requires_grad_() for _ in range(n)]
    x2 = [leaf(x) for x in xs]
    for y in [a(x) for x in xs]: cubed(y).backward()
    for x in x2: cubed(b(x)).backward()
    for x,o in zip(xs, x2): same(x.grad, o.grad)
    same(a.window_grad, b.window_grad)
    same(a.weight.grad, b.weight.grad)

@both
def test_backwards_on_one_retained_graph(settings):
    """The first adds the running term, and each its own:
    together they are one backward of the sum, running gradient included"""
    a,b = twins(warm(layer(**settings)))
    x = data().requires_grad_()
    z = leaf(x)
    loss,whole = cubed(a(x)),cubed(b(z))
    gs = [torch.autograd.grad(loss, x, retain_graph=True)[0]
        for _ in range(3)]
    same(gs[2], gs[1])
    of_sum, = torch.autograd.grad(3*whole, z)
    same(sum(gs), of_sum)
    same(a.window_grad, b.window_grad)
    assert torch.equal(gs[0], gs[1])==(not a.running_grad)

@pytest.mark.parametrize('what', ['x','weight'])
def test_double_backward_says_why_not(what):
    a,x = warm(layer()),data().requires_grad_()
    by = x if what=='x' else a.weight
    g, = torch.autograd.grad(cubed(a(x)), by, create_graph=True)
    with pytest.raises(RuntimeError, match='cannot be differentiated twice.*evaluation mode'):
        g.pow(2).sum().backward()

def test_a_gradient_penalty_works_in_evaluation():
    a,x = warm(layer()).eval(),data().requires_grad_()
    g, = torch.autograd.grad(cubed(a(x)), x, create_graph=True)
    g.pow(2).sum().backward()
    assert x.grad.isfinite().all()

acts = dict(
    relu=nn.ReLU(inplace=True),
    leaky=nn.LeakyReLU(.1, inplace=True),
    silu=nn.SiLU(inplace=True),
    mul_=lambda y: y.mul_(2).add_(1))
@pytest.mark.parametrize('act', acts.values(), ids=acts)
def test_in_place_activations_after_the_layer(act):
    a,x = warm(layer()),data().requires_grad_()
    b,x2 = deepcopy(a),leaf(x)
    act(a(x)).pow(3).sum().backward()
    act(b(x2).clone()).pow(3).sum().backward()
    same(x.grad, x2.grad)
    same(a.weight.grad, b.weight.grad)

def test_an_input_changed_in_place_is_pytorchs_error():
    x = data().requires_grad_()
    h = x*1
    y = layer()(h)
    h.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()

@pytest.mark.parametrize('frozen', ['weight','bias','both'])
def test_frozen_parameters(frozen):
    a,x = warm(layer()),data().requires_grad_()
    b,x2 = deepcopy(a),leaf(x)
    for n,p in a.named_parameters():
        p.requires_grad_(frozen not in (n,'both'))
    cubed(a(x)).backward()
    cubed(b(x2)).backward()
    same(x.grad, x2.grad)
    same(a.window_grad, b.window_grad)
    for (n,p),q in zip(a.named_parameters(), b.parameters()):
        if p.requires_grad: same(p.grad, q.grad)
        else: assert p.grad is None

def test_an_input_that_needs_no_gradient():
    a,b = twins(warm(layer()))
    x = data()
    cubed(a(x)).backward()
    cubed(b(leaf(x))).backward()
    assert x.grad is None
    same(a.weight.grad, b.weight.grad)
    same(a.window_grad, b.window_grad)

@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_training_forward_updates_the_window(mode):
    a,b = twins(warm(layer()))
    x = data()
    with mode(): y = a(x)
    same(y.clone(), b(x.requires_grad_()).detach())
    for k in ('window_mean','window_var','running_mean','num_batches_tracked'):
        same(getattr(a, k), getattr(b, k))
    cubed(a(data().requires_grad_())).backward()                        # and trains on

# activation checkpointing

def block(shared=False):
    first = layer()
    second = first if shared else layer()
    def conv(): return nn.Conv2d(3,3,3, padding=1)
    return nn.Sequential(conv(), first, nn.ReLU(inplace=True),
        conv(), second).double()

def plain(net, x, reentrant): return net(x)
def once(net, x, reentrant): return checkpoint(net, x, use_reentrant=reentrant)
def nested(net, x, reentrant):
    "Two checkpoints within one"
    def inner(o):
        h = once(net[:3], o, reentrant)
        return once(net[3:], h, reentrant)
    return once(inner, x, reentrant)

def near_grads(a, b, **tols):
    "Gradients of the parameters of `b` are those of `a`"
    for (k,p),q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(q.grad, p.grad, msg=k, **tols)
def near_buffers(a, b, **tols):
    for (k,p),q in zip(a.named_buffers(), b.buffers()):
        torch.testing.assert_close(q, p, msg=k, **tols)

@either
@pytest.mark.parametrize('how', [once,nested])
@pytest.mark.parametrize('shared', [False,True], ids=['two norms','one norm twice'])
@pytest.mark.parametrize('forwards', [1,3])
def test_checkpointed_gradients_and_state_are_the_plain_ones(how, reentrant, shared, forwards):
    a,b = twins(block(shared))
    tols = dict(rtol=1e-9, atol=1e-9)
    for _ in range(5):
        xs = [data().requires_grad_() for _ in range(forwards)]
        x2 = [leaf(x) for x in xs]
        for f,net,ins in ((plain,a,xs), (how,b,x2)):
            ys = [f(net, x, reentrant) for x in ins]
            for y in ys: cubed(y).backward()
        for x,o in zip(xs, x2):
            torch.testing.assert_close(o.grad, x.grad, **tols)
    near_grads(a, b, **tols)
    near_buffers(a, b, **tols)

@either
def test_a_whole_checkpointed_resnet(reentrant):
    a,b = twins(to_runbn(resnet18(num_classes=4)).double())
    def checkpointed(x):
        x = b.maxpool(b.relu(b.bn1(b.conv1(x))))
        for stage in (b.layer1,b.layer2,b.layer3,b.layer4):
            x = checkpoint_sequential(stage, 2, x, use_reentrant=reentrant)
        return b.fc(b.avgpool(x).flatten(1))
    for _ in range(2):
        x,y = data(2,3,32,32),torch.tensor([0,3])
        for f in (a,checkpointed):
            nn.functional.cross_entropy(f(x), y).backward()
    near_grads(a, b, rtol=1e-8, atol=1e-10)
    near_buffers(a, b, rtol=1e-8, atol=1e-10)

def test_batch_norm_itself_counts_a_checkpointed_batch_twice():
    bn,run = nn.BatchNorm2d(3),RunningBatchNorm2d(3)
    for l in (bn,run):
        x = torch.randn(2,3,4,4).requires_grad_()
        checkpoint(l, x, use_reentrant=False).sum().backward()
    assert [l.num_batches_tracked.item() for l in (bn,run)] == [2,1]

def test_a_checkpointed_bad_batch_is_skipped_once():
    a,b = twins(block())
    for bad in (False,True,False):
        x = data()
        if bad: x[0,0,0,0] = float('inf')
        for f,net in ((plain,a),(once,b)):
            y = f(net, x.clone().requires_grad_(), False)
            (y**2).sum().backward()
    assert [net[1].skipped_batches.item() for net in (a,b)] == [1,1]
    near_buffers(a, b)

# torch.func

def test_functional_call_is_the_layer():
    a,b = twins(warm(layer()))
    x = data()
    state = {**dict(a.named_parameters()), **dict(a.named_buffers())}
    y = functional_call(a, state, (x,))
    same(y, b(x))
    same(a.window_mean, b.window_mean)
    other = {k:v.clone() for k,v in state.items()}
    functional_call(a, other, (x,))
    # the state given is the state that moves
    assert not torch.equal(other['window_mean'], a.window_mean)
    same(a.window_mean, b.window_mean)

def test_per_sample_gradients_say_why_not():
    a = layer()
    params,x = dict(a.named_parameters()),data()
    def loss(p, x): return functional_call(a, p, (x,)).sum()
    def loss_of_one(p, o): return loss(p, o[None])
    by_sample = vmap(grad(loss_of_one), in_dims=(None,0))
    def of_samples(): return by_sample(params, x)
    def of_all(): return grad(loss)(params, x)
    for f in (of_samples,of_all):
        with pytest.raises(RuntimeError, match='torch.func.*GroupNorm'): f()
    a.eval()
    assert of_samples()['weight'].shape == (2,3)
