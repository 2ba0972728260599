"""On a GPU, where there is one: CUDA's kernels beside the reference and the formulas, no waiting,
half precision, memory, the compiler, moving"""
from copy import deepcopy
from itertools import cycle
import pytest,torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity,profile
from torch.testing import assert_close
from fastai.basics import default_device,load_learner,set_seed
from fastai_runbn.bench.speed import peak_memory
from fastai_runbn.bench.quality import trial
from fastai_runbn.callback import RunBNCallback
from fastai_runbn.graph import GraphedForward
from fastai_runbn.layers import LESSON10,RunningBatchNorm1d,RunningBatchNorm2d,RunningBatchNorm3d
from fastai_runbn.moments import AdaptiveWindow
from fastai_runbn.reference import ReferenceRunningBatchNorm
from fastai_runbn.surgery import to_runbn
from learners import make,running

parametrize = pytest.mark.parametrize
cuda_is_here = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not cuda_is_here, reason='there is no CUDA here')
device = 'cuda' if cuda_is_here else 'cpu'
C = 5
each_backend = parametrize('backend', ['auto','triton'])
paths = {'auto':'aten', 'triton':'triton'}
forms = { # layer, space, memory format
    '(N,C)':(RunningBatchNorm1d,(),None),
    '(N,C,L)':(RunningBatchNorm1d,(300,),None),
    '2d':(RunningBatchNorm2d,(7,6),None),
    'channels_last':(RunningBatchNorm2d,(7,6),torch.channels_last),
    'large':(RunningBatchNorm2d,(130,90),None),
    'large channels_last':(RunningBatchNorm2d,(130,90),torch.channels_last),
    '3d':(RunningBatchNorm3d,(6,5,7),None),
    'channels_last_3d':(RunningBatchNorm3d,(6,5,7),torch.channels_last_3d)}
every_form = parametrize('form', forms)
kinds = {'default':{},
    'adaptive':dict(window=AdaptiveWindow(30)), 'lesson10':LESSON10,
    'cumulative':dict(momentum=None, clamp=None),
    'not affine':dict(affine=False)}
all_settings = parametrize('settings', kinds.values(), ids=kinds)

def batches(form, n, dtype, sizes=(2,1,4,3,8)):
    "`n` batches of changing size, and gradients of the same layout"
    _,space,fmt = forms[form]
    for _,bs in zip(range(n), cycle(sizes)):
        x = torch.randn(bs, C, *space, device=device)*2+1
        x = x.to(dtype)
        if fmt: x = x.to(memory_format=fmt)
        yield x,torch.randn_like(x)

def norm_of(form, **kw):
    "A layer for batches of that form, on the device"
    return forms[form][0](C, device=device, **kw)
def exact_of(form, **settings):
    "The same in formulas, in float64 on the CPU"
    return forms[form][0](C, dtype=torch.float64, backend='formulas', **settings)
def exact(t): return t.cpu().double()
def grads_and_buffers(m):
    return [*[p.grad for p in m.parameters()], *m.buffers()]

def step(layer, x, dy):
    "Output, gradients and state"
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    grads = [p.grad for p in layer.parameters()]
    buffers = [b.clone() for b in layer.buffers()]
    return [y.detach(), x.grad, *grads, *buffers]
def exact_step(layer, x, dy):
    return step(layer, exact(x), exact(dy))

def same(a, b, tol, what=''):
    for k,(p,q) in enumerate(zip(a, b, strict=True)):
        def say(m): return f'{what}, value {k}: {m}'
        assert_close(exact(p), exact(q), rtol=tol, atol=tol, msg=say)

@every_form
@parametrize('backend', ['auto','formulas'])
def test_beside_the_reference(form, backend):
    "Lesson 10's settings, in float64"
    layer = norm_of(form, dtype=torch.float64, backend=backend, **LESSON10)
    ref = ReferenceRunningBatchNorm(C).double().to(device)
    for k,(x,dy) in enumerate(batches(form, 40, torch.float64)):
        y,dx,dw,db,*_ = step(layer, x, dy)
        have = [y, dx, dw, db, layer.window_mean]
        xr = x.clone().requires_grad_()
        ref.zero_grad()
        yr = ref(xr)
        yr.backward(dy)
        mean = (ref.sums/ref.count).detach()
        want = [yr, xr.grad, ref.mults.grad, ref.adds.grad, mean]
        same(have, want, 1e-9, f'step {k}')
    assert layer.path==('formulas' if backend=='formulas' else 'aten')

@every_form
@all_settings
@parametrize('dtype,tol,backend', [(torch.float64,1e-9,'auto'),
    (torch.float32,1e-3,'auto'), (torch.float32,1e-3,'triton')], ids=str)
def test_beside_the_formulas_on_the_cpu(form, settings, dtype, tol, backend):
    layer = norm_of(form, dtype=dtype, backend=backend, **settings)
    twin = exact_of(form, **settings)
    for k,(x,dy) in enumerate(batches(form, 12, dtype)):
        have,want = step(layer, x, dy),exact_step(twin, x, dy)
        same(have, want, tol, f'step {k}')
    assert layer.path==paths[backend]
    y = layer.eval()(x)
    want = twin.eval()(exact(x))
    same([y], [want], tol)

@every_form
@each_backend
@parametrize('dtype,tol', [(torch.float16,2e-3), (torch.bfloat16,1.6e-2)], ids=str)
def test_half_precision(form, dtype, tol, backend):
    "Of the largest value, two roundings of the dtype; of .01 where all but cancels"
    layer,twin = norm_of(form, backend=backend),exact_of(form)
    for x,dy in batches(form, 12, dtype):
        got,want = step(layer, x, dy),exact_step(twin, x, dy)
        for p,q in zip(got[:4], want[:4]):
            largest = q.abs().max().clamp(min=.01)
            assert (exact(p)-q).abs().max() <= tol*largest
        same(got[4:], want[4:], 1e-3)
    assert got[0].dtype==got[1].dtype==dtype
    assert layer.window_mean.dtype==torch.float32
    assert layer.path==paths[backend]

@every_form
@all_settings
@each_backend
def test_nothing_waits(form, settings, backend):
    "PyTorch raises where the host would wait for the GPU"
    layer = norm_of(form, backend=backend, **settings)
    data = list(batches(form, 4, torch.float32))
    step(layer, *data[0])
    torch.cuda.set_sync_debug_mode('error')
    try:
        for x,dy in data: step(layer, x, dy)
    finally: torch.cuda.set_sync_debug_mode('default')

@each_backend
@parametrize('ratio', [1e2,1e4])
def test_large_means(ratio, backend):
    "|mean|/σ up to 1e4 in float32"
    layer = RunningBatchNorm2d(C, device=device, backend=backend)
    twin = RunningBatchNorm2d(C, device=device).double()
    worst = 0.
    for _ in range(100):
        x = torch.randn(2,C,16,16, device=device)+ratio
        with torch.no_grad():
            y,y64 = layer(x).double(),twin(x.double())
        off = (y-y64).norm()/y64.norm()
        worst = max(worst, float(off))
    assert worst < 2e-7*ratio

@each_backend
def test_a_bad_batch_and_one_value_per_channel(backend):
    layer,twin = norm_of('2d', backend=backend),exact_of('2d')
    for k in range(12):
        bs = 1 if k%2 else 2
        x,dy = [torch.randn(bs,C,1,1, device=device) for _ in range(2)]
        if k==5: x[0,2] = float('nan')
        if k==7: x[0,3] = float('inf')
        got,want = step(layer, x, dy),exact_step(twin, x, dy)
        if k not in (5,7): same(got, want, 1e-4, f'step {k}')
    assert layer.skipped_batches==2
    assert all(b.isfinite().all() for b in layer.buffers())

@each_backend
@parametrize('settings', [{}, LESSON10], ids=['default','lesson10'])
def test_compiled_by_inductor(settings, backend):
    "A model compiled as a whole"
    dtype,tol = (torch.float64,1e-9) if backend=='auto' else (torch.float32,1e-3)
    torch._dynamo.reset()
    norm = RunningBatchNorm2d(8, backend=backend, **settings)
    first,last = nn.Conv2d(C,8,3),nn.Conv2d(8,C,3)
    net = nn.Sequential(first, norm, nn.ReLU(), last)
    net.to(device, dtype)
    twin = deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True)
    for x,_ in batches('2d', 12, dtype):
        for m,forward in ((net,net), (twin,compiled)):
            m.zero_grad()
            (forward(x)**2).mean().backward()
        same(grads_and_buffers(net), grads_and_buffers(twin), tol)

def test_checkpointed():
    "As without"
    net = nn.Sequential(nn.Conv2d(C,8,3), RunningBatchNorm2d(8), nn.ReLU())
    net.double().to(device)
    twin = deepcopy(net)
    def checkpointed(x): return checkpoint(twin, x, use_reentrant=False)
    for x,_ in batches('2d', 12, torch.float64):
        for m,forward in ((net,net), (twin,checkpointed)):
            m.zero_grad()
            (forward(x)**3).sum().backward()
        same(grads_and_buffers(net), grads_and_buffers(twin), 1e-9)

# ------------------------------------------------------------------------------------ Triton
@every_form
@parametrize('dtype', [torch.float32,torch.bfloat16], ids=str)
def test_triton_is_the_same_to_the_bit(form, dtype):
    "From run to run, with work on another stream or not: no race, no sum whose order is chance"
    def run(busy):
        torch.manual_seed(0)
        layer = norm_of(form, backend='triton')
        got = []
        a = torch.randn(2048,2048, device=device)
        for x,dy in batches(form, 8, dtype, sizes=(8,2)):
            if busy:
                with torch.cuda.stream(busy):
                    a = (a@a).tanh()
            got += step(layer, x, dy)
        torch.cuda.synchronize()
        return got
    want,busy = run(None),torch.cuda.Stream()
    for other in (None,busy,busy):
        got = run(other)
        for i,(a,b) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(a, b), i

@every_form
def test_triton_launches_two_kernels_or_four_and_nothing_else(form):
    layer = norm_of(form, backend='triton')
    x,dy = next(batches(form, 1, torch.float32))
    for _ in range(2): step(layer, x, dy)
    x.requires_grad_()
    layer.zero_grad()
    activities = [ProfilerActivity.CPU,ProfilerActivity.CUDA]
    with profile(activities=activities) as p:
        layer(x).backward(dy)
        torch.cuda.synchronize()
    names = [e.name for e in p.events()
        if e.device_type==DeviceType.CUDA]
    split = ['runbn_forward','runbn_normalize','runbn_backward','runbn_input_gradient']
    assert names in (['runbn_forward','runbn_backward'],split), names

@every_form
@parametrize('how', ['loop','split','small blocks'])
def test_triton_with_other_blocks(form, how, monkeypatch):
    from fastai_runbn.kernels import cuda
    from interpreter import plans
    own = cuda.blocks
    def blocks(*args): return plans[how](own(*args))
    monkeypatch.setattr(cuda, 'blocks', blocks)
    cuda.plan_of.cache_clear()
    layer,twin = norm_of(form, backend='triton'),exact_of(form)
    for x,dy in batches(form, 4, torch.float32):
        same(step(layer, x, dy), exact_step(twin, x, dy), 1e-3)
    cuda.plan_of.cache_clear()

@every_form
@each_backend
def test_in_a_graph(form, backend):
    "Outputs, gradients and state of replays are those of the layer, and recording leaves no trace"
    layer = nn.Sequential(norm_of(form, backend=backend))
    twin = deepcopy(layer)
    graphed = GraphedForward(layer)
    def check(x, dy, what):
        have,want = step(layer, x, dy),step(twin, x, dy)
        same(have, want, 1e-5, what)
    data = batches(form, 6, torch.float32, sizes=(2,))
    for k,(x,dy) in enumerate(data): check(x, dy, f'step {k}')
    assert len(graphed.graphs)==1
    check(x[:1], dy[:1], 'one sample')
    assert len(graphed.graphs)==1
    graphed.remove()

@each_backend
@parametrize('to', [None,'to_fp16','to_bf16'])
def test_a_learner_with_a_graph(to, backend, on_gpu):
    "Figures of a fit as without it"
    losses = []
    for graph in (False,True):
        set_seed(0)
        cb = RunBNCallback(graph=graph, backend=backend)
        learn = make('plain', cb, bs=4)
        if to: getattr(learn, to)()
        with learn.no_bar(),learn.no_logging(): learn.fit(1, .01)
        train,valid = learn.recorder.values[0][:2]
        losses.append([float(train),float(valid)])
        assert 'forward' not in vars(learn.model)
    plain,graphed = [train for train,_ in losses]
    assert abs(plain-graphed)<.05*plain, losses

@parametrize('fmt', [torch.contiguous_format,torch.channels_last], ids=str)
@parametrize('auto', [False,True], ids=['float32','autocast'])
@each_backend
def test_memory_is_batch_norms(fmt, auto, backend):
    "Peak of a forward and a backward of ResNet-18"
    from torchvision.models import resnet18
    x = torch.randn(2,3,128,128, device=device)
    x = x.to(memory_format=fmt)
    peak = []
    for model in (resnet18(), to_runbn(resnet18(), backend=backend)):
        model = model.to(device, memory_format=fmt)
        def run():
            with torch.autocast(device, torch.bfloat16, enabled=auto):
                loss = model(x).float().square().mean()
            loss.backward()
        for _ in range(3): run()
        peak.append(peak_memory(run, device))
    assert peak[1] <= 1.02*peak[0]

def test_moved_and_loaded():
    "To the GPU and back in the midst of training, and a checkpoint from there into BatchNorm here"
    layer,stays = [RunningBatchNorm2d(C).double() for _ in range(2)]
    for k,(x,dy) in enumerate(batches('2d', 12, torch.float64)):
        where = device if k%2 else 'cpu'
        layer.to(where)
        have = step(layer, x.to(where), dy.to(where))
        want = step(stays, x.cpu(), dy.cpu())
        same(have, want, 1e-9)
    bn = nn.BatchNorm2d(C).double()
    bn.load_state_dict(layer.to(device).state_dict())
    y = bn.eval()(x.cpu())
    want = layer.eval()(x)
    same([y], [want], 1e-9)

@pytest.fixture
def on_gpu():
    default_device(True)
    yield
    default_device(False)

@parametrize('to', [None,'to_fp16','to_bf16'])
@parametrize('kind', ['plain','vision'])
def test_a_learner_on_the_gpu(kind, to, on_gpu, tmp_path):
    "Trains, finds a rate, validates, saves, and is loaded without a GPU"
    learn = make(kind, RunBNCallback(), bs=4, path=tmp_path)
    if to: getattr(learn, to)()
    with learn.no_bar():
        learn.lr_find(show_plot=False, num_it=20)
        learn.fit_one_cycle(1, .02 if kind=='plain' else 1e-3)
        loss,accuracy = learn.validate()
    norms = running(learn)
    assert norms and accuracy > .7
    for m in norms:
        assert m.path=='aten' and m.window_mean.is_cuda
        assert m.window_mean.dtype==torch.float32
        assert all(b.isfinite().all() for b in m.buffers())
    learn.export('net.pkl')
    there = load_learner(tmp_path/'net.pkl', cpu=True)
    x,_ = learn.dls.valid.one_batch()
    with torch.no_grad():
        y = there.model.eval()(x.cpu())
        want = learn.model.eval()(x)
    same([y], [want], 2e-2) # convolutions on the GPU have 10 bits of mantissa

def test_a_trial_of_the_study(on_gpu):
    row = trial('R1 digits', 'ours', bs=8, lr=.1, seed=0, epochs=1)
    assert row['score'] > .8
