"""A CUDA graph's place in a training loop, on the CPU: `torch.cuda.make_graphed_callables` is stood
in for by something with its habits. On a GPU test_cuda.py has the real one"""
from copy import deepcopy
import pytest,torch
from torch import nn
from fastai.basics import (Callback,CancelBatchException,CancelFitException,CrossEntropyLossFlat,
    DataLoaders,Learner,SGD)
from fastai_runbn import graph
from fastai_runbn.all import GraphCallback,GraphedForward,RunBNCallback,follow_scaler,to_runbn
from fastai_runbn.layers import running_norms

parametrize = pytest.mark.parametrize
def bn_net():
    "Of BatchNorm; always of the same weights"
    torch.manual_seed(0)
    block = nn.Conv2d(3,8,3),nn.BatchNorm2d(8),nn.ReLU(),nn.Dropout(.1)
    head = nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(8,2)
    return nn.Sequential(*block, *head)
def our_net(): return to_runbn(bn_net())
nets = parametrize('net', [bn_net,our_net], ids=['BatchNorm','ours'])
def name_of(f): return getattr(f, '__name__', f)

@pytest.fixture
def recorded(monkeypatch):
    "What has been recorded, and a list of replays with each"
    res = []
    def stand_in(model, sample_args, allow_unused_input=False):
        """Warms up, with gradients of whatever is there; a replay copies into its own memory,
        broadcasting"""
        x,plain,replays = sample_args[0],model.forward,[]
        for _ in range(3):
            y = model(*sample_args)
            params = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad([y], params, [torch.full_like(y, 1e30)])
        scales = [m._said_scale(x) for m in running_norms(model)]
        cached = torch.is_autocast_cache_enabled()
        res.append((tuple(x.shape), replays, cached, scales))
        def replay(*args):
            for mine,a in zip(sample_args, args): mine.data.copy_(a)
            replays.append(tuple(args[0].shape))
            return plain(*[a.clone() for a in sample_args])
        model.forward = replay
        return model
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', stand_in)
    return res

def steps(model, sizes):
    "Outputs, gradients and buffers of a step for each batch size"
    torch.manual_seed(0)
    res = []
    for bs in sizes:
        y = model(torch.randn(bs,3,8,8))
        y.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        kept = [t.clone() for t in (*grads,*model.buffers())]
        res += [y.detach(), *kept]
        model.zero_grad()
    return res

def same(a, b):
    for x,y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)

@nets
def test_training_is_the_models_own(net, recorded):
    "To the bit, dropout included; a partial batch is neither recorded nor broadcast"
    model = net()
    GraphedForward(model)
    sizes = [2,2,1,2,2]
    same(steps(model, sizes), steps(net(), sizes))
    (shape,replays,*_), = recorded
    assert shape==(2,3,8,8) and replays==[shape]*4

@nets
def test_another_size_that_stays_is_recorded(net, recorded):
    model = net()
    GraphedForward(model)
    sizes = [2,3,3,3,2]
    same(steps(model, sizes), steps(net(), sizes))
    assert [shape[0] for shape,*_ in recorded]==[2,3]

@nets
def test_evaluation_and_what_needs_no_gradient_are_plain(net, recorded):
    model,x = net(),torch.randn(2,3,8,8)
    GraphedForward(model)
    steps(model, [2])
    with torch.no_grad(): model(x)
    model.eval()
    model(x)
    assert len(recorded)==1 and len(recorded[0][1])==1

def frozen(m): m[0].requires_grad_(False)
def in_evaluation(m): m[1].eval()
def moved(m): m[1].running_mean = m[1].running_mean.clone()
def other_parameter(m):
    weight = m[0].weight.detach().clone()
    m[0].weight = nn.Parameter(weight)
def other_window(m): m[1].set_settings(window=8)
def other_momentum(m): m[1].momentum = .2
def held(m): m[1].track_running_stats = False
changes = frozen,in_evaluation,moved,other_parameter,other_window,other_momentum,held
@parametrize('change', changes, ids=name_of)
def test_recorded_anew_where_something_has_changed(change, recorded):
    a,b = our_net(),our_net()
    GraphedForward(a)
    for m in (a,b):
        steps(m, [2])
        change(m)
    same(steps(a, [2,2,2]), steps(b, [2,2,2]))
    assert len(recorded)==2

def test_there_are_four_graphs_at_most(recorded):
    "Recorded; more sizes are a warning, and plain"
    model = our_net()
    GraphedForward(model)
    sizes = [2,3,3,4,4,5,5,6,6]
    with pytest.warns(UserWarning, match='each with memory of its own'): got = steps(model, sizes)
    same(got, steps(our_net(), sizes))
    assert len(recorded)==4

def test_autocast_and_the_scale_of_the_loss(recorded):
    "Recorded without autocast's cache; norms read the scale, for a graph cannot be told"
    model = our_net()
    scaler = torch.amp.GradScaler('cpu', init_scale=4.)
    follow_scaler(model, scaler)
    GraphedForward(model)
    with torch.autocast('cpu', torch.bfloat16): model(torch.randn(2,3,8,8))
    (_,_,cached,scales), = recorded
    assert not cached and scales==[scaler._scale]
    norm = model[1]
    assert norm.scaler_tells and norm._said_scale(torch.ones(2)) is False
    assert len(norm.recent.saved)<=1

def hooked(m): m[1].register_forward_hook(print)
def checkpointed(m): m[0].grad_checkpointing = True
def in_processes(m): graph.in_parallel = lambda model: True
refusals = [(hooked,'`1` .BatchNorm2d. has a hook'),
    (checkpointed,'`0` .Conv2d. has activation'), (in_processes,'several processes')]
@parametrize('what,says', refusals, ids=lambda o: getattr(o, '__name__', ''))
def test_refused_with_the_reason(what, says, monkeypatch):
    monkeypatch.setattr(graph, 'in_parallel', graph.in_parallel)
    model = bn_net()
    what(model)
    with pytest.raises(RuntimeError, match=says): GraphedForward(model)
    assert 'forward' not in vars(model)

class Look(Callback):
    "Notes whose forward it is"
    order = 95
    def before_fit(self): self.seen = set()
    def before_batch(self):
        graphed = 'forward' in vars(self.model)
        self.seen.add((self.training,graphed))
    def after_pred(self): deepcopy(self.model)

def learner(*cbs):
    "With a partial batch at the end"
    torch.manual_seed(0)
    xs,ys = torch.randn(11,3,8,8),torch.randint(2, (11,))
    pairs = list(zip(xs, ys))
    dls = DataLoaders.from_dsets(pairs, pairs, bs=2,
        device='cpu', shuffle=False, drop_last=False)
    return Learner(dls, bn_net(), loss_func=CrossEntropyLossFlat(),
        opt_func=SGD, metrics=[], cbs=[*cbs,Look()])

@pytest.fixture
def everywhere(monkeypatch):
    "Graphs are made on the CPU, too"
    monkeypatch.setattr(GraphCallback, 'fits', lambda self: True)

def graphed_runbn(): return RunBNCallback(graph=True)
makers = [(GraphCallback,[]), (graphed_runbn,[RunBNCallback])]
@parametrize('make,plain', makers, ids=['alone','RunBNCallback'])
def test_a_fit(make, plain, recorded, everywhere):
    "As without; its own forward in validation, in copies, and afterwards; and once more"
    a = learner(make())
    b = learner(*[cb() for cb in plain])
    for learn in (a,b):
        with learn.no_bar(),learn.no_logging():
            torch.manual_seed(1)
            learn.fit(2, 1e-2)
            learn.fit(1, 1e-2)
    assert len(recorded)==2
    assert a.look.seen=={(True,True),(False,False)}
    assert 'forward' not in vars(a.model)
    left = [cb for cb in a.cbs if isinstance(cb, GraphCallback)]
    assert len(left)==(make is GraphCallback)
    same(a.model.state_dict().values(), b.model.state_dict().values())
    assert a.recorder.values==b.recorder.values

class Stop(Callback):
    "Raises at the first such event"
    order = 100
    def __init__(self, event, error):
        self.error = error
        setattr(self, event, self.stop)
    def stop(self):
        error,self.error = self.error,None
        if error: raise error

stops = [('after_pred',KeyboardInterrupt), ('after_backward',KeyboardInterrupt),
    ('before_batch',CancelBatchException), ('after_loss',CancelFitException)]
@parametrize('event,error', stops, ids=name_of)
def test_a_fit_that_is_interrupted_leaves_the_models_own(event, error, recorded, everywhere):
    "And the next one trains"
    learn = learner(RunBNCallback(graph=True), Stop(event, error))
    with learn.no_bar(),learn.no_logging():
        if error is KeyboardInterrupt:
            with pytest.raises(error): learn.fit(1)
        else: learn.fit(1)
        assert 'forward' not in vars(learn.model)
        learn.fit(1)
    assert len(recorded)==2 and 'forward' not in vars(learn.model)
    assert not any(isinstance(cb, GraphCallback) for cb in learn.cbs)

def test_batches_that_are_cancelled_leave_the_models_own(recorded, everywhere):
    class Skip(Callback):
        order = 100
        def before_batch(self): raise CancelBatchException
    learn = learner(GraphCallback(), Skip())
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    assert 'forward' not in vars(learn.model) and not recorded

def test_a_forward_that_fails_leaves_the_models_own(recorded, everywhere):
    learn = learner(GraphCallback())
    learn.model[6] = nn.Linear(9,2)
    with learn.no_bar(),learn.no_logging():
        with pytest.raises(RuntimeError): learn.fit(1)
    assert 'forward' not in vars(learn.model)

def test_on_the_cpu_a_fit_says_so():
    learn = learner(RunBNCallback(graph=True))
    with learn.no_bar(),learn.no_logging():
        with pytest.warns(UserWarning, match='not on a GPU'): learn.fit(1)
    assert learn.look.seen=={(True,False),(False,False)}
