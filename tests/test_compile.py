"Compiled training is eager training: outputs, gradients and every buffer, float64, while the batch size changes; evaluation can be exported and traced"
import re,shutil
from copy import deepcopy
import pytest,torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint
from fastai_runbn.functional import implementation,to_operator
from fastai_runbn.layers import LESSON10,RunningBatchNorm2d,RunningBatchNorm3d
from fastai_runbn.moments import AdaptiveWindow

needs_compiler = pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='Inductor needs a C++ compiler')
all_settings = {'default':{}, 'adaptive':dict(window=AdaptiveWindow(30)), 'lesson10':LESSON10,
    'cumulative':dict(momentum=None, running_grad=1.),
    'window':dict(window=20, clamp=None, persistent_window=True)}
cases = [*(pytest.param('inductor', n, marks=needs_compiler) for n in all_settings), ('aot_eager','default'), ('aot_eager','lesson10')]

@pytest.fixture(autouse=True)
def fresh(): torch._dynamo.reset(); counters.clear()

def net(**settings): return nn.Sequential(nn.Conv2d(3,4,3), RunningBatchNorm2d(4,**settings), nn.ReLU(), nn.Conv2d(4,4,3), RunningBatchNorm2d(4,**settings)).double()
def close(a, b, what): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m: f'{what}: {m}')

@pytest.mark.parametrize('backend,name', cases)
def test_compiled_equals_eager(backend, name):
    "20 steps; after the first two sizes nothing is compiled again, and there is no graph break"
    eager = net(**all_settings[name])
    twin = deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for step,bs in enumerate((2,4,3,7,2,5,2,4,6,3,9,2,8,2,3,11,2,4,5,2)):
        x,dy = torch.randn(bs,3,8,8).double(),torch.randn(bs,4,4,4).double()
        xs = [x.clone().requires_grad_() for _ in range(2)]
        eager.zero_grad(); twin.zero_grad()
        y = eager(xs[0]); y.backward(dy)
        with torch._dynamo.config.patch(error_on_recompile=step>1):
            z = compiled(xs[1]); z.backward(dy)
        at = f'step {step}, bs {bs}'
        close(z, y, f'y, {at}'); close(xs[1].grad, xs[0].grad, f'dx, {at}')
        for (k,a),b in zip(eager.named_parameters(), twin.parameters()): close(b.grad, a.grad, f'{k}, {at}')
        for (k,a),b in zip(eager.named_buffers(), twin.buffers()): close(b, a, f'{k}, {at}')
    assert counters['stats']['unique_graphs'] == 2                      # one for the first size, one for all others
    assert not counters['graph_break']

@needs_compiler
@pytest.mark.parametrize('name', all_settings)
def test_two_images_and_nothing_after_the_norm(name):
    "The sizes at which Inductor of torch 2.11 fused the running gradient's update into the loop that reads it"
    eager = net(**all_settings[name])[:2]
    twin = deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True)
    for step in range(4):
        x = torch.randn(2,3,7,6).double()
        for m,f in ((eager,eager), (twin,compiled)): m.zero_grad(); (f(x)**3).sum().backward()
        for (k,a),b in zip((*eager.named_parameters(),*eager.named_buffers()), (*twin.parameters(),*twin.buffers())): close(b, a, f'{k}, step {step}')
        for (k,a),b in zip(eager.named_parameters(), twin.parameters()): close(b.grad, a.grad, f'gradient of {k}, step {step}')

@pytest.mark.parametrize('where', ['checkpoint in compile','compile in checkpoint'])
def test_compiled_checkpoints_are_an_error_with_a_remedy(where):
    def run(remedy):
        torch._dynamo.reset()
        torch.manual_seed(0)
        a = net(); b = deepcopy(a)
        if remedy:
            for m in b:
                if isinstance(m, nn.BatchNorm2d): m.forward = torch.compiler.disable(m.forward)
        inner = torch.compile(b, backend='aot_eager')
        f = (torch.compile(lambda x: checkpoint(b, x, use_reentrant=False), backend='aot_eager') if where=='checkpoint in compile' else
             lambda x: checkpoint(inner, x, use_reentrant=False))
        for _ in range(3):
            x = torch.randn(2,3,8,8).double()
            for g in (a,f): (g(x)**3).sum().backward()
        for (k,p),q in zip(a.named_parameters(), b.parameters()): close(q.grad, p.grad, k)
        for (k,p),q in zip(a.named_buffers(), b.buffers()): close(q, p, k)
    with pytest.raises(RuntimeError, match='checkpointing and torch.compile do not go together.*torch.compiler.disable'): run(False)
    run(True)

def test_export_and_trace_in_evaluation():
    n = nn.Sequential(nn.Conv3d(3,4,3), RunningBatchNorm3d(4), nn.ReLU())
    for _ in range(3): n(torch.randn(2,3,6,6,6))
    n.eval()
    x = torch.randn(2,3,6,6,6)
    assert torch.equal(torch.jit.trace(n, x)(x), n(x))
    exported = torch.export.export(n, (x,), dynamic_shapes=(dict(enumerate([torch.export.Dim('bs', min=2, max=64)])),))
    y = torch.randn(5,3,6,6,6)
    assert torch.equal(exported.module()(y), n(y))
    assert 'fastai_runbn' not in str(exported.graph)                    # PyTorch's own operators only

@pytest.mark.parametrize('train', [True,False], ids=['updates','held'])
def test_operators_are_what_they_say(train):
    """They write what their schema says, and have results like those that tracers see. Not said is the
    flag in `saved` that tells what is owed: a compiler would keep that in a copy"""
    norm,x = RunningBatchNorm2d(4, window=AdaptiveWindow()),torch.randn(3,4,5,5)
    norm.running_mean.fill_(.5)        # trained: its window is long, and moves with each batch
    norm.num_batches_tracked.fill_(50)
    norm.track_running_stats = train
    norm(torch.randn(6,4,5,5))
    state,numbers = norm.state(),norm.step(x)
    step,saved = to_operator(numbers, x),implementation(x, state).statistics(x, state, numbers)
    ops = torch.ops.fastai_runbn
    backward = torch.randn_like(x),x,saved,state.grad,torch.tensor(2.)
    cases = (ops.statistics.default,(x, *state, *step)),(ops.reaction.default,(*backward, *step))
    for op,args in cases:
        torch.library.opcheck(op, args, test_utils='test_faketensor')
        names = [a.name for a in op._schema.arguments]
        said = {a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write}
        before = deepcopy(args)
        op(*args)
        pairs = [(n,a,b) for n,a,b in zip(names, before, args) if torch.is_tensor(b)]
        changed = {n for n,a,b in pairs if not torch.equal(a, b)}
        assert changed-{'saved'}<=said, (op, changed-said)
        if train: assert said-changed<={'skipped'}, (op, said-changed)

@needs_compiler
def test_what_inductor_makes_of_it():
    "One operator a pass for a layer, fused kernels between, and no state is copied"
    def block(): return nn.Sequential(nn.Conv2d(3,3,3,bias=False), RunningBatchNorm2d(3), nn.ReLU())
    net = nn.Sequential(block(), block())
    x,compiled = torch.randn(2,3,16,16),torch.compile(net, fullgraph=True)
    _,codes = run_and_get_code(lambda: compiled(x).sum().backward())
    calls = [c[c.index('def call('):] for c in codes if 'def call(' in c]
    def times(name): return [n for c in calls if (n := c.count(f'fastai_runbn.{name}.default('))]
    assert times('statistics')==times('reaction')==[2] # in one graph, and once a layer
    copies = r'clone|copy_\(|auto_functionalized|empty_strided\w*\(\(7, '
    for c in calls: assert not re.search(copies, c), c
