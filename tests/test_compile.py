"""Compiled training is eager training: outputs, gradients and every buffer, float64, while the
batch size changes; evaluation can be exported and traced"""
import re,shutil
from copy import deepcopy
import pytest,torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from fastai_runbn.functional import implementation,to_operator
from fastai_runbn.layers import LESSON10,RunningBatchNorm2d,RunningBatchNorm3d
from fastai_runbn.moments import AdaptiveWindow

parametrize = pytest.mark.parametrize
compiler = shutil.which('g++') or shutil.which('clang++')
needs_compiler = pytest.mark.skipif(not compiler, reason='Inductor needs a C++ compiler')
all_settings = dict(default={},
    adaptive=dict(window=AdaptiveWindow(30)), lesson10=LESSON10,
    cumulative=dict(momentum=None, running_grad=1.),
    window=dict(window=20, clamp=None, persistent_window=True))
by_inductor = [pytest.param('inductor', n, marks=needs_compiler) for n in all_settings]
cases = [*by_inductor, ('aot_eager','default'), ('aot_eager','lesson10')]

@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()

def conv_norm(ni, **settings):
    return nn.Conv2d(ni,4,3),RunningBatchNorm2d(4, **settings)
def net(**settings):
    first,second = conv_norm(3, **settings),conv_norm(4, **settings)
    return nn.Sequential(*first, nn.ReLU(), *second).double()
def close(a, b, what):
    assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m: f'{what}: {m}')
def grads_and_buffers_close(a, b, at):
    for (k,p),q in zip(a.named_parameters(), b.parameters()):
        close(q.grad, p.grad, f'gradient of {k}, {at}')
    for (k,p),q in zip(a.named_buffers(), b.buffers()):
        close(q, p, f'{k}, {at}')

sizes = 2,4,3,7,2,5,2,4,6,3,9,2,8,2,3,11,2,4,5,2

@parametrize('backend,name', cases)
def test_compiled_equals_eager(backend, name):
    "20 steps; after the first two sizes nothing is compiled again, and there is no graph break"
    eager = net(**all_settings[name])
    twin = deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for step,bs in enumerate(sizes):
        x = torch.randn(bs,3,8,8).double()
        dy = torch.randn(bs,4,4,4).double()
        xs = [x.clone().requires_grad_() for _ in range(2)]
        eager.zero_grad()
        twin.zero_grad()
        y = eager(xs[0])
        y.backward(dy)
        with torch._dynamo.config.patch(error_on_recompile=step>1):
            z = compiled(xs[1])
            z.backward(dy)
        at = f'step {step}, bs {bs}'
        close(z, y, f'y, {at}')
        close(xs[1].grad, xs[0].grad, f'dx, {at}')
        grads_and_buffers_close(eager, twin, at)
    # one for the first size, one for all others
    assert counters['stats']['unique_graphs'] == 2
    assert not counters['graph_break']

@needs_compiler
@parametrize('name', all_settings)
def test_two_images_and_nothing_after_the_norm(name):
    """The sizes at which Inductor of torch 2.11 fused the running gradient's update into the loop
    that reads it"""
    eager = net(**all_settings[name])[:2]
    twin = deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True)
    for step in range(4):
        x = torch.randn(2,3,7,6).double()
        for m,forward in ((eager,eager), (twin,compiled)):
            m.zero_grad()
            (forward(x)**3).sum().backward()
        for (k,p),q in zip(eager.named_parameters(), twin.parameters()):
            close(q, p, f'{k}, step {step}')
        grads_and_buffers_close(eager, twin, f'step {step}')

@parametrize('where', ['checkpoint in compile','compile in checkpoint'])
def test_compiled_checkpoints_are_an_error_with_a_remedy(where):
    def run(remedy):
        "Three steps, compiled and eager; with the remedy: norms that are not compiled"
        torch._dynamo.reset()
        torch.manual_seed(0)
        eager = net()
        twin = deepcopy(eager)
        if remedy:
            for m in twin:
                if not isinstance(m, nn.BatchNorm2d): continue
                m.forward = torch.compiler.disable(m.forward)
        def compiled(f): return torch.compile(f, backend='aot_eager')
        inside = where=='compile in checkpoint'
        model = compiled(twin) if inside else twin
        def checkpointed(x): return checkpoint(model, x, use_reentrant=False)
        forward = checkpointed if inside else compiled(checkpointed)
        for _ in range(3):
            x = torch.randn(2,3,8,8).double()
            for f in (eager,forward): (f(x)**3).sum().backward()
        grads_and_buffers_close(eager, twin, 'after three steps')
    says = 'checkpointing and torch.compile do not go together.*torch.compiler.disable'
    with pytest.raises(RuntimeError, match=says): run(False)
    run(True)

def test_export_and_trace_in_evaluation():
    n = nn.Sequential(nn.Conv3d(3,4,3), RunningBatchNorm3d(4), nn.ReLU())
    for _ in range(3):
        n(torch.randn(2,3,6,6,6))
    n.eval()
    x = torch.randn(2,3,6,6,6)
    traced = torch.jit.trace(n, x)
    assert torch.equal(traced(x), n(x))
    rows = torch.export.Dim('bs', min=2, max=64)
    exported = torch.export.export(n, (x,), dynamic_shapes=({0:rows},))
    y = torch.randn(5,3,6,6,6)
    assert torch.equal(exported.module()(y), n(y))
    assert 'fastai_runbn' not in str(exported.graph) # PyTorch's own operators only

@parametrize('train', [True,False], ids=['updates','held'])
def test_operators_are_what_they_say(train):
    """They write what their schema says, and have results like those that tracers see. Not said is
    the flag in `saved` that tells if the running term is due: a compiler would keep that in a
    copy"""
    norm = RunningBatchNorm2d(4, window=AdaptiveWindow())
    x = torch.randn(3,4,5,5)
    norm.running_mean.fill_(.5) # trained: its window is long, and moves with each batch
    norm.num_batches_tracked.fill_(50)
    norm.track_running_stats = train
    norm(torch.randn(6,4,5,5))
    state,numbers = norm.state(),norm.step(x)
    step = to_operator(numbers, x)
    saved = implementation(x, state).statistics(x, state, numbers)
    dy,scale = torch.randn_like(x),torch.tensor(2.)
    ops = torch.ops.fastai_runbn
    forward = ops.statistics.default,(x, *state, *step)
    backward = ops.reaction.default,(dy, x, saved, state.grad, scale, *step)
    def writes(argument): return argument.alias_info and argument.alias_info.is_write
    for op,args in (forward,backward):
        torch.library.opcheck(op, args, test_utils='test_faketensor')
        arguments = op._schema.arguments
        said = {a.name for a in arguments if writes(a)}
        before = deepcopy(args)
        op(*args)
        changed = {a.name for a,was,now in zip(arguments, before, args)
            if torch.is_tensor(now) and not torch.equal(was, now)}
        assert changed-{'saved'}<=said, (op, changed-said)
        if train: assert said-changed<={'skipped'}, (op, said-changed)

@needs_compiler
def test_what_inductor_makes_of_it():
    "One operator a pass for a layer, fused kernels between, and no state is copied"
    def block():
        conv = nn.Conv2d(3,3,3,bias=False)
        return nn.Sequential(conv, RunningBatchNorm2d(3), nn.ReLU())
    net = nn.Sequential(block(), block())
    x = torch.randn(2,3,16,16)
    compiled = torch.compile(net, fullgraph=True)
    _,codes = run_and_get_code(lambda: compiled(x).sum().backward())
    calls = [c[c.index('def call('):] for c in codes if 'def call(' in c]
    def times(name):
        "Calls of an operator in each graph that has some"
        counts = [c.count(f'fastai_runbn.{name}.default(') for c in calls]
        return [n for n in counts if n]
    assert times('statistics')==times('reaction')==[2] # in one graph, and once a layer
    copies = r'clone|copy_\(|auto_functionalized|empty_strided\w*\(\(7, '
    for c in calls: assert not re.search(copies, c), c
