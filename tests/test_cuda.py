"On a GPU, where there is one: CUDA's kernels beside the reference and the formulas, no waiting, half precision, memory, the compiler, moving"
from copy import deepcopy
import pytest,torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity,profile
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

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA here')
device = 'cuda' if torch.cuda.is_available() else 'cpu'
C = 5
each_backend = pytest.mark.parametrize('backend', ['auto','triton'])
paths = {'auto':'aten', 'triton':'triton'}
forms = {'(N,C)':(RunningBatchNorm1d,(),None), '(N,C,L)':(RunningBatchNorm1d,(300,),None), '2d':(RunningBatchNorm2d,(7,6),None), 'channels_last':(RunningBatchNorm2d,(7,6),torch.channels_last),
         'large':(RunningBatchNorm2d,(130,90),None), 'large channels_last':(RunningBatchNorm2d,(130,90),torch.channels_last),
         '3d':(RunningBatchNorm3d,(6,5,7),None), 'channels_last_3d':(RunningBatchNorm3d,(6,5,7),torch.channels_last_3d)}
every_form = pytest.mark.parametrize('form', forms)
kinds = {'default':{}, 'adaptive':dict(window=AdaptiveWindow(30)), 'lesson10':LESSON10,
    'cumulative':dict(momentum=None, clamp=None), 'not affine':dict(affine=False)}
all_settings = pytest.mark.parametrize('settings', kinds.values(), ids=kinds)

def batches(form, n, dtype, sizes=(2,1,4,3,8)):
    "`n` batches of changing size, and gradients of the same layout"
    _,space,fmt = forms[form]
    for i in range(n):
        x = (torch.randn(sizes[i%len(sizes)],C,*space, device=device)*2+1).to(dtype)
        if fmt: x = x.to(memory_format=fmt)
        yield x,torch.randn_like(x)

def step(layer, x, dy):
    "Output, gradients and state"
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *[p.grad for p in layer.parameters()], *[b.clone() for b in layer.buffers()]]

def same(a, b, tol, what=''):
    for k,(p,q) in enumerate(zip(a, b, strict=True)): torch.testing.assert_close(p.cpu().double(), q.cpu().double(), rtol=tol, atol=tol, msg=lambda m: f'{what}, value {k}: {m}')

@every_form
@pytest.mark.parametrize('backend', ['auto','formulas'])
def test_beside_the_reference(form, backend):
    layer,ref = forms[form][0](C, dtype=torch.float64, device=device, backend=backend, **LESSON10),ReferenceRunningBatchNorm(C).double().to(device)
    for k,(x,dy) in enumerate(batches(form, 40, torch.float64)):
        y,dx,dw,db,*_ = step(layer, x, dy)
        xr = x.clone().requires_grad_()
        ref.zero_grad()
        (yr := ref(xr)).backward(dy)
        same([y,dx,dw,db,layer.window_mean], [yr,xr.grad,ref.mults.grad,ref.adds.grad,(ref.sums/ref.count).detach()], 1e-9, f'step {k}')
    assert layer.path==('formulas' if backend=='formulas' else 'aten')

@every_form
@all_settings
@pytest.mark.parametrize('dtype,tol,backend', [(torch.float64,1e-9,'auto'),
    (torch.float32,1e-3,'auto'), (torch.float32,1e-3,'triton')], ids=str)
def test_beside_the_formulas_on_the_cpu(form, settings, dtype, tol, backend):
    layer = forms[form][0](C, dtype=dtype, device=device, backend=backend, **settings)
    exact = forms[form][0](C, dtype=torch.float64, backend='formulas', **settings)
    for k,(x,dy) in enumerate(batches(form, 12, dtype)): same(step(layer, x, dy), step(exact, x.cpu().double(), dy.cpu().double()), tol, f'step {k}')
    assert layer.path==('triton' if backend=='triton' else 'aten')
    same([layer.eval()(x)], [exact.eval()(x.cpu().double())], tol)

@every_form
@each_backend
@pytest.mark.parametrize('dtype,tol', [(torch.float16,2e-3),(torch.bfloat16,1.6e-2)], ids=str)
def test_half_precision(form, dtype, tol, backend):
    "Of the largest value, two roundings of the dtype; of .01 where all but cancels"
    layer = forms[form][0](C, device=device, backend=backend)
    exact = forms[form][0](C, dtype=torch.float64, backend='formulas')
    for x,dy in batches(form, 12, dtype):
        got,want = step(layer, x, dy),step(exact, x.cpu().double(), dy.cpu().double())
        for p,q in zip(got[:4], want[:4]): assert (p.cpu().double()-q).abs().max() <= tol*q.abs().max().clamp(min=.01)
        same(got[4:], want[4:], 1e-3)
    assert got[0].dtype==got[1].dtype==dtype and layer.window_mean.dtype==torch.float32
    assert layer.path==paths[backend]

@every_form
@all_settings
@each_backend
def test_nothing_waits(form, settings, backend):
    "PyTorch raises where the host would wait for the GPU"
    layer = forms[form][0](C, device=device, backend=backend, **settings)
    data = list(batches(form, 4, torch.float32))
    step(layer, *data[0])
    torch.cuda.set_sync_debug_mode('error')
    try:
        for x,dy in data: step(layer, x, dy)
    finally: torch.cuda.set_sync_debug_mode('default')

@each_backend
@pytest.mark.parametrize('ratio', [1e2,1e4])
def test_large_means(ratio, backend):
    "|mean|/σ up to 1e4 in float32"
    layer,worst = RunningBatchNorm2d(C, device=device, backend=backend),0.
    exact = RunningBatchNorm2d(C, device=device).double()
    for _ in range(100):
        x = torch.randn(2,C,16,16, device=device)+ratio
        with torch.no_grad(): y,y64 = layer(x).double(),exact(x.double())
        worst = max(worst, float((y-y64).norm()/y64.norm()))
    assert worst < 2e-7*ratio

@each_backend
def test_a_bad_batch_and_one_value_per_channel(backend):
    layer = RunningBatchNorm2d(C, device=device, backend=backend)
    exact = RunningBatchNorm2d(C, backend='formulas', dtype=torch.float64)
    for k in range(12):
        x,dy = torch.randn(1 if k%2 else 2,C,1,1, device=device),torch.randn(1 if k%2 else 2,C,1,1, device=device)
        if k==5: x[0,2] = float('nan')
        if k==7: x[0,3] = float('inf')
        got,want = step(layer, x, dy),step(exact, x.cpu().double(), dy.cpu().double())
        if k not in (5,7): same(got, want, 1e-4, f'step {k}')
    assert layer.skipped_batches==2 and all(b.isfinite().all() for b in layer.buffers())

@each_backend
@pytest.mark.parametrize('settings', [{}, LESSON10], ids=['default','lesson10'])
def test_compiled_by_inductor(settings, backend):
    "A model compiled as a whole"
    dtype,tol = (torch.float64,1e-9) if backend=='auto' else (torch.float32,1e-3)
    torch._dynamo.reset()
    norm = RunningBatchNorm2d(8, backend=backend, **settings)
    net = nn.Sequential(nn.Conv2d(C,8,3), norm, nn.ReLU(), nn.Conv2d(8,C,3)).to(device, dtype)
    twin = deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True)
    for x,_ in batches('2d', 12, dtype):
        for m,f in ((net,net), (twin,compiled)): m.zero_grad(); (f(x)**2).mean().backward()
        a,b = [[*[p.grad for p in m.parameters()],*m.buffers()] for m in (net,twin)]
        same(a, b, tol)

def test_checkpointed():
    net = nn.Sequential(nn.Conv2d(C,8,3), RunningBatchNorm2d(8), nn.ReLU()).double().to(device)
    twin = deepcopy(net)
    for x,_ in batches('2d', 12, torch.float64):
        for m,f in ((net,net), (twin,lambda x: checkpoint(twin, x, use_reentrant=False))): m.zero_grad(); (f(x)**3).sum().backward()
        same([*[p.grad for p in net.parameters()],*net.buffers()], [*[p.grad for p in twin.parameters()],*twin.buffers()], 1e-9)

# ------------------------------------------------------------------------------------ Triton
@every_form
@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16], ids=str)
def test_triton_is_the_same_to_the_bit(form, dtype):
    "From run to run, with work on another stream or not: no race, no sum whose order is chance"
    def run(busy):
        torch.manual_seed(0)
        layer,got = forms[form][0](C, device=device, backend='triton'),[]
        a = torch.randn(2048,2048, device=device)
        for x,dy in batches(form, 8, dtype, sizes=(8,2)):
            if busy:
                with torch.cuda.stream(busy): a = (a@a).tanh()
            got += step(layer, x, dy)
        torch.cuda.synchronize()
        return got
    want,busy = run(None),torch.cuda.Stream()
    for other in (None,busy,busy):
        for i,(a,b) in enumerate(zip(run(other), want, strict=True)): assert torch.equal(a, b), i

@every_form
def test_triton_launches_two_kernels_or_four_and_nothing_else(form):
    layer = forms[form][0](C, device=device, backend='triton')
    x,dy = next(batches(form, 1, torch.float32))
    for _ in range(2): step(layer, x, dy)
    x.requires_grad_()
    layer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU,ProfilerActivity.CUDA]) as p:
        layer(x).backward(dy)
        torch.cuda.synchronize()
    names = [e.name for e in p.events() if e.device_type==DeviceType.CUDA]
    split = ['runbn_forward','runbn_normalize','runbn_backward','runbn_input_gradient']
    assert names in (['runbn_forward','runbn_backward'],split), names

@every_form
@pytest.mark.parametrize('how', ['loop','split','small blocks'])
def test_triton_with_other_blocks(form, how, monkeypatch):
    from fastai_runbn.kernels import cuda
    from interpreter import plans
    own = cuda.blocks
    monkeypatch.setattr(cuda, 'blocks', lambda *args: plans[how](own(*args)))
    cuda.plan_of.cache_clear()
    layer = forms[form][0](C, device=device, backend='triton')
    exact = forms[form][0](C, dtype=torch.float64, backend='formulas')
    for x,dy in batches(form, 4, torch.float32):
        same(step(layer, x, dy), step(exact, x.cpu().double(), dy.cpu().double()), 1e-3)
    cuda.plan_of.cache_clear()

@every_form
@each_backend
def test_in_a_graph(form, backend):
    "Outputs, gradients and state of replays are those of the layer, and recording leaves no trace"
    layer = nn.Sequential(forms[form][0](C, device=device, backend=backend))
    twin = deepcopy(layer)
    graphed = GraphedForward(layer)
    for k,(x,dy) in enumerate(batches(form, 6, torch.float32, sizes=(2,))):
        same(step(layer, x, dy), step(twin, x, dy), 1e-5, f'step {k}')
    assert len(graphed.graphs)==1
    same(step(layer, x[:1], dy[:1]), step(twin, x[:1], dy[:1]), 1e-5, 'one sample')
    assert len(graphed.graphs)==1
    graphed.remove()

@each_backend
@pytest.mark.parametrize('to', [None,'to_fp16','to_bf16'])
def test_a_learner_with_a_graph(to, backend, on_gpu):
    "Figures of a fit as without it"
    losses = []
    for graph in (False,True):
        set_seed(0)
        learn = make('plain', RunBNCallback(graph=graph, backend=backend), bs=4)
        if to: getattr(learn, to)()
        with learn.no_bar(),learn.no_logging(): learn.fit(1, .01)
        losses.append([float(o) for o in learn.recorder.values[0][:2]])
        assert 'forward' not in vars(learn.model)
    assert abs(losses[0][0]-losses[1][0])<.05*losses[0][0], losses

@pytest.mark.parametrize('fmt', [torch.contiguous_format,torch.channels_last], ids=str)
@pytest.mark.parametrize('auto', [False,True], ids=['float32','autocast'])
@each_backend
def test_memory_is_batch_norms(fmt, auto, backend):
    "Peak of a forward and a backward of ResNet-18"
    from torchvision.models import resnet18
    x,peak = torch.randn(2,3,128,128, device=device).to(memory_format=fmt),[]
    for model in (resnet18(), to_runbn(resnet18(), backend=backend)):
        model = model.to(device, memory_format=fmt)
        def run():
            with torch.autocast(device, torch.bfloat16, enabled=auto): loss = model(x).float().square().mean()
            loss.backward()
        for _ in range(3): run()
        peak.append(peak_memory(run, device))
    assert peak[1] <= 1.02*peak[0]

def test_moved_and_loaded():
    "To the GPU and back in the midst of training, and a checkpoint from there into BatchNorm here"
    layer,stays = RunningBatchNorm2d(C).double(),RunningBatchNorm2d(C).double()
    for k,(x,dy) in enumerate(batches('2d', 12, torch.float64)):
        layer.to(device if k%2 else 'cpu')
        same(step(layer, x.to(layer.weight.device), dy.to(layer.weight.device)), step(stays, x.cpu(), dy.cpu()), 1e-9)
    bn = nn.BatchNorm2d(C).double()
    bn.load_state_dict(layer.to(device).state_dict())
    same([bn.eval()(x.cpu())], [layer.eval()(x)], 1e-9)

@pytest.fixture
def on_gpu():
    default_device(True)
    yield
    default_device(False)

@pytest.mark.parametrize('to', [None,'to_fp16','to_bf16'])
@pytest.mark.parametrize('kind', ['plain','vision'])
def test_a_learner_on_the_gpu(kind, to, on_gpu, tmp_path):
    "Trains, finds a rate, validates, saves, and is loaded without a GPU"
    learn = make(kind, RunBNCallback(), bs=4, path=tmp_path)
    if to: getattr(learn, to)()
    with learn.no_bar():
        learn.lr_find(show_plot=False, num_it=20)
        learn.fit_one_cycle(1, .02 if kind=='plain' else 1e-3)
        loss,accuracy = learn.validate()
    assert running(learn) and all(m.path=='aten' and m.window_mean.is_cuda and m.window_mean.dtype==torch.float32 for m in running(learn))
    assert all(b.isfinite().all() for m in running(learn) for b in m.buffers()) and accuracy > .7
    learn.export('net.pkl')
    there = load_learner(tmp_path/'net.pkl', cpu=True)
    x,_ = learn.dls.valid.one_batch()
    with torch.no_grad(): same([there.model.eval()(x.cpu())], [learn.model.eval()(x)], 2e-2) # convolutions there have 10 bits of mantissa

def test_a_trial_of_the_study(on_gpu): assert trial('R1 digits', 'ours', 8, .1, 0, epochs=1)['score'] > .8
