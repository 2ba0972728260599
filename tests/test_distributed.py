"Several processes, one window: gloo on this machine, each test in bounded time"
import os,subprocess,sys
from pathlib import Path
import pytest,torch
from torch import nn
from fastai_runbn.distributed import sync_window,window_sync
from fastai_runbn.layers import LESSON10
from fastai_runbn.moments import AdaptiveWindow
import ranked
from delayed import DelayedNorm,delayed,train_delayed
from ranks import Ranks

root = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()

@pytest.fixture(scope='module')
def four():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()

def same(a, b, tol=1e-10):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)
def same_buffers(a, b, tol=1e-10, scale=1):
    "`scale`: of the gradients of `b`, whose losses may be means of other batches"
    assert a.keys()==b.keys()
    for k in a:
        want = b[k]*scale if k.endswith('window_grad') else b[k]
        torch.testing.assert_close(a[k], want,
            rtol=tol, atol=tol, msg=lambda m: f'{k}: {m}')

def trained(model, steps, lr=.05):
    "Losses of one process with batches of four"
    opt = torch.optim.SGD(model.parameters(), lr)
    return ranked.train(model, ranked.batches(steps, 4), opt)

# one window

@pytest.mark.parametrize('mode,dtype,broadcast',
    [('step',torch.float32,True), ('step',torch.float64,False),
    ('layer',torch.float32,False)], ids=str)
def test_windows_are_bit_equal_after_each_of_200_steps(two, mode, dtype, broadcast):
    a,b = two(ranked.bit_equal, mode, 200, dtype, broadcast)
    for k in a: assert torch.equal(a[k], b[k])
    assert a['1.num_batches_tracked']==200 and a['1.samples_seen']==800

@pytest.mark.parametrize('mode', ['step','layer'])
def test_windows_of_four_are_bit_equal_after_each_of_200_steps(four, mode):
    four(ranked.bit_equal, mode, 200, torch.float32, True)

kinds = {'default':{},
    'adaptive':dict(window=AdaptiveWindow(24)), 'lesson10':LESSON10,
    'cumulative':dict(momentum=None, eval_window=None, running_grad=.5)}
settings = pytest.mark.parametrize('kw', kinds.values(), ids=kinds)

@settings
def test_layer_is_one_process_with_the_whole_batch(two, kw):
    "Two ranks of two against one process of four"
    (l0,b0),(l1,_) = two(ranked.as_one, 'layer', 30, kw)
    model = ranked.small(**kw)
    losses = trained(model, 30)
    same((l0+l1)/2, losses)
    same_buffers(b0, ranked.buffers(model), scale=2)

@pytest.mark.parametrize('mode', ['layer','step'])
def test_a_scheduled_window(two, mode):
    "A tensor that changes from step to step: the pooled batch has the weight of its own step"
    (l0,b0),(l1,_) = two(ranked.as_one, mode, 10, {}, True)
    model = ranked.small()
    shared = torch.zeros((), dtype=torch.float64)
    for m in ranked.norms(model): m.window = shared
    model[0].register_forward_pre_hook(ranked.Schedule(shared))
    losses = trained(model, 10, lr=.05 if mode=='layer' else 0.)
    if mode=='layer':
        same((l0+l1)/2, losses)
        same_buffers(b0, ranked.buffers(model), scale=2)
    else: same(b0['1.window_count'], model[1].window_count) # made of the weights alone

@settings
@pytest.mark.parametrize('sizes,n_acc',
    [((2,2),1), ((3,1),1), ((2,2),3)],
    ids=['even','uneven','accumulated'])
def test_step_is_the_delay_written_out(two, kw, sizes, n_acc):
    """`sync='step'` against one process that does the same with formulas at full length;
    accumulated under `no_sync`"""
    steps = 20
    got = two(ranked.micro, kw, sizes, steps, n_acc)
    model = delayed(ranked.small(**kw), 2)
    scale = 2/sum(sizes)/n_acc
    def of_ranks(xs, ys):
        return [(x,y,scale)
            for x,y in zip(xs.split(sizes), ys.split(sizes))]
    data = [of_ranks(*b)
        for b in ranked.batches(steps*n_acc, sum(sizes))]
    micros = [data[i:i+n_acc]
        for i in range(0, len(data), n_acc)]
    losses = train_delayed(model, micros, 2)
    for (l,_),m in zip(got, losses): same(l, m)
    for i,l in enumerate(model):
        if not isinstance(l, DelayedNorm): continue
        _,buffers = got[0]
        b = {k.split('.')[1]:v for k,v in buffers.items()
            if k.startswith(f'{i}.')}
        want = dict(window_mean=l.mean, window_var=l.var, window_count=l.n,
            running_mean=l.avg_mean, running_var=l.avg_var,
            window_grad=torch.stack((l.g1,l.g2)),
            window_innovations=torch.stack(l.known))
        for k,v in want.items(): same(b[k], v)
        counters = 'samples_seen','num_batches_tracked','skipped_batches'
        assert [b[k].item() for k in counters] == [l.seen,l.t,0]

# collectives

channels = dict(resnet18=(20,4800), resnet50=(53,26560),
    efficientnet_b0=(49,21008))
@pytest.mark.parametrize('arch', channels)
def test_collectives_of_a_step(two, arch):
    """From Python, and of all that gloo did less those of DDP alone; SyncBatchNorm has 2 a layer
    (in its source: it does not run on a CPU), as 'layer' has"""
    L,C = channels[arch]
    _,ddp,*_ = two(ranked.counted, arch, 'BatchNorm')[0]
    for mode,most in (('step',1),('layer',2*L)):
        if mode=='layer' and arch!='resnet18': continue # 10 s each
        mine,of_gloo,nbytes,norms,chans = two(ranked.counted, arch, mode)[0]
        assert (norms,chans)==(L,C)
        assert mine==most and of_gloo-ddp==most
        counts = 3*L if mode=='step' else 2*3*L
        assert nbytes==8*(6*C+counts)

def test_sync_batch_norm_has_two_a_layer():
    "Read in its source: one gather in the forward, one sum in the backward"
    import inspect
    from torch.nn.modules import _functions
    cls = _functions.SyncBatchNorm
    forward,backward = (inspect.getsource(f) for f in (cls.forward,cls.backward))
    assert 'all_gather' in forward and 'all_reduce' not in forward
    assert 'all_gather' not in backward and 'all_reduce' in backward

# uneven, empty and bad batches

@pytest.mark.parametrize('mode', ['step','layer'])
@pytest.mark.parametrize('last', [(2,1),(2,0),(0,3)], ids=str)
def test_last_batches_that_differ(two, mode, last):
    """A last batch that is smaller on one rank, or empty, counts for what it has:
    the window is that of one process with all of it"""
    before,after,w = two(ranked.uneven, mode, last)[0]
    model = ranked.small()
    for p,v in zip(model.parameters(), w): p.data.copy_(v)
    for k,b in model.named_buffers():
        if k in before: b.copy_(before[k])
    x,_ = ranked.batches(1, sum(last), seed=9)[0]
    model(x)
    names = ('window_mean','window_var','window_count','running_mean','running_var',
        'samples_seen','num_batches_tracked','eval_steps')
    # deeper layers see what theirs normalised with
    for n in names: same(after[f'1.{n}'], model.get_buffer(f'1.{n}'))
    def without_grads(buffers):
        return {k:v for k,v in buffers.items() if 'grad' not in k}
    if mode=='layer':
        same_buffers(without_grads(after), without_grads(ranked.buffers(model)))

@pytest.mark.parametrize('mode', ['step','layer'])
def test_a_nan_on_one_rank_poisons_nobody(two, mode):
    "Its channels stay out of the window, of all ranks alike; a good rank's batch is in"
    (a,skipped),(b,_) = two(ranked.bad_batch, mode, 1)
    for k in a: assert torch.equal(a[k], b[k])
    assert skipped==[1,1,1] and a['1.num_batches_tracked']==4
    conv,norm,*_ = ranked.small(window=60)
    mean,n = 0.,0.
    for i,(x,_) in enumerate(ranked.batches(4, 4)):
        # of the third only what rank 0 had; the batch weighs what its four samples do
        c = conv(x[:2] if i==2 else x).detach()
        M = c.numel()//4
        w = 4/norm.window
        n = (1-w)*n+w*M
        rho = w*M/n
        mean = mean+rho*(c.mean((0,2,3))-mean)
    same(a['1.window_mean'], mean)

def test_a_dead_rank_is_an_error_and_no_broken_checkpoint(tmp_path):
    """The error is torch.distributed's; what the others can save afterwards
    is the last window that all had"""
    for mode in ('step','layer'):
        ranks = Ranks(2, seconds=10)
        try:
            got = ranks.all(ranked.dies, mode, str(tmp_path),
                timeout=60, but=(1,))
            (ok,res), = got.values()
        finally: ranks.kill()
        assert ok, res
        told,kept,finite = res
        errors = 'RuntimeError','DistBackendError','DistNetworkError'
        assert any(e in told for e in errors), told
        # within a layer there is no step that all have finished
        assert finite and (kept or mode=='layer')
        saved = torch.load(tmp_path/'0.pt', weights_only=True)
        ranked.small().load_state_dict(saved)

@pytest.mark.parametrize('what,said',
    [('number',"rank 0 has 3 running norms, rank 1 has 2: '4' is missing on rank 1"),
    ('names',"'4' and 1 more is missing on rank 1"),
    ('channels',"'8' has 24 channels on rank 0 and 25 on rank 1"),
    ('setting',"'1' has running_grad=1.0 on rank 0 and 0.5 on rank 1"),
    ('mode',"rank 0 asks for 'step', rank 1 for 'layer'")])
def test_ranks_that_differ_are_told_in_what(two, what, said):
    a,b = two(ranked.refused, what)
    assert a==b and said in a

def test_join_of_uneven_inputs(two):
    "`Join([net, sync])` works; without `sync`, or within a layer, it is an error that says so"
    assert two(ranked.joined, 'both')==[(5,16)]*2 # 4 samples in three steps, 2 in two
    assert all('Join([net, sync])' in o for o in two(ranked.joined, 'net'))
    assert all('cannot join uneven inputs' in o for o in two(ranked.joined, 'layer'))

# DDP and others

@pytest.mark.parametrize('kind',
    ['static_graph','find_unused_parameters','forward_sync_buffers','compiled'])
def test_options_of_ddp(two, kind):
    known = nn.parallel.DistributedDataParallel.__init__.__code__.co_varnames
    if kind=='forward_sync_buffers' and kind not in known: pytest.skip('not in this torch')
    res,_ = two(ranked.wrapped, kind)
    if kind!='find_unused_parameters':
        same_buffers(res, two(ranked.wrapped, 'plain')[0])
    else:
        assert res['a.1.samples_seen']==res['b.1.samples_seen']==10
        assert res['stem.1.samples_seen']==20

def test_windows_of_each_rank(two):
    """`sync=None`: each its own, until DDP's `broadcast_buffers` overwrites those of the others
    by rank 0's at the next forward"""
    alike = 'seen','tracked','count','steps','skipped','floor'
    for broadcast in (True,False):
        (a,a2),(b,b2) = two(ranked.local, broadcast)
        for k in ('1.window_mean','1.running_mean'):
            assert not torch.equal(a[k], b[k])
        for k in a:
            if any(o in k for o in alike): continue
            assert torch.equal(a2[k], b2[k])==broadcast
        assert torch.equal(a['1.window_mean'], a2['1.window_mean'])

@pytest.mark.parametrize('how',
    ['state_dict','pickle','deepcopy','save','export','evaluate'])
@pytest.mark.parametrize('broadcast', [True,False])
def test_one_rank_may_read(two, how, broadcast):
    """What rank 0 alone does between steps needs nobody, and changes nothing:
    not even when DDP then broadcasts what rank 0 has merged, and others have not"""
    got,_ = two(ranked.read_by_one, how, broadcast)
    want,_ = two(ranked.read_by_one, '', False)
    for k in want: assert torch.equal(got[k], want[k])

def test_forwards_without_a_backward(two):
    a,_ = two(ranked.no_gradient)
    assert a['1.num_batches_tracked']==3 and a['1.samples_seen']==12

def test_two_forwards_before_one_backward(two): two(ranked.twice)

@pytest.mark.parametrize('mode', ['step','layer'])
def test_several_backwards_of_a_forward_add_up(two, mode):
    whole,in_parts = (two(ranked.again, mode, n) for n in (1,3))
    for (grads,windows),(parts,others) in zip(whole, in_parts):
        same(parts, grads)
        same_buffers(others, windows)

@pytest.mark.parametrize('mode', ['step','layer'])
def test_held_layers_and_statistics_that_others_write(two, mode):
    for moved,mean,seen in two(ranked.held_and_copied, mode):
        assert not moved
        assert (mean>4).all()
        # a full window of what was written, in the layer that it was written to
        assert seen[0]>2**39 and seen[1]<2**39

@pytest.mark.parametrize('mode', ['step','layer'])
def test_activation_checkpointing(two, mode):
    want,_ = two(ranked.checkpointed, mode, None)
    for reentrant in (False,True):
        got,_ = two(ranked.checkpointed, mode, reentrant)
        same_buffers(got, want)

def test_to_bn_lets_go(two): assert two(ranked.back_to_bn)==[True,True]

@pytest.mark.parametrize('version', [1,2])
def test_fsdp_on_gloo(two, version):
    (want_l,want),_ = two(ranked.plain_ddp)
    (l,b),_ = two(ranked.fsdp, version)
    torch.testing.assert_close(l, want_l, rtol=1e-4, atol=1e-5)
    same_buffers(b, want, 1e-4)

@pytest.mark.skipif(torch.cuda.is_available(), reason='with a GPU DataParallel is another thing')
def test_data_parallel_on_a_cpu():
    """Without a GPU DataParallel calls the model as it is; with some, each copy would merge
    its part into a window that is thrown away, but for the first's"""
    a,b = ranked.small(),ranked.small()
    net = nn.DataParallel(b)
    x,y = ranked.batches(1, 4)[0]
    for m in (a,net):
        nn.functional.cross_entropy(m(x), y).backward()
    same_buffers(ranked.buffers(a), ranked.buffers(b))

def test_alone():
    "Without several processes there is nothing to do, and an error says what is missing"
    model = ranked.small()
    with pytest.raises(RuntimeError, match='init_process_group'): sync_window(model)
    with pytest.raises(ValueError, match="mode='both'"): sync_window(model, 'both')
    assert sync_window(model, None) is None
    assert window_sync(model) is None

# fastai

script = '''
import gc,json,os,sys,warnings
import torch, torch.distributed as dist
torch.set_num_threads(1)
from fastai.distributed import DistributedDL
from fastai.vision.all import *
sys.path.insert(0, sys.argv[2])
from fastai_runbn.all import *
from fastai_runbn.bench.tasks import digits_dls,lesson10_convnet
from ranked import Count
def on_a_cpu(self, t, rank): # fastai's own puts the order of the samples on a GPU
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = on_a_cpu
what,out = sys.argv[1],sys.argv[3]

class Check(Callback):
    "Windows of all ranks after each step, and collectives of it"
    order = -70 # before ShortEpochCallback, which ends the last batch of an epoch early
    def before_batch(self): self.count = Count().__enter__()
    def after_batch(self):
        self.count.__exit__()
        if not self.training: return
        self.calls.append(len([c for c in self.count.calls if c=='all_reduce']))
        sync = self.learn.run_bn._sync
        if sync is None: return
        if not sync.hold: sync.settle()
        for m in self.learn.model.modules():
            if not hasattr(m, 'window_mean'): continue
            for k,b in m._buffers.items():
                all_ = [torch.empty_like(b) for _ in range(2)]
                dist.all_gather(all_, b)
                assert torch.equal(*all_), k

set_seed(1)
sync = dict(none=None).get(what, 'layer' if what=='layer' else 'step')
learn = Learner(digits_dls(2), lesson10_convnet(), metrics=accuracy,
    opt_func=SGD, lr=.01, cbs=RunBNCallback(sync=sync))
learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
learn.path = Path(out)
cbs = [ShortEpochCallback(.02, short_valid=False)]
if what=='accumulation': cbs.append(GradientAccumulation(8))
check = Check()
check.calls = []
with warnings.catch_warnings(record=True) as got:
    warnings.simplefilter('always')
    with learn.distrib_ctx(cpu=True), learn.no_logging():
        learn.fit(2, cbs=[*cbs,check])
        learn.validate()
        if not dist.get_rank(): learn.save('rank0') # alone
    learn.export('rank0.pkl') # by rank 0; that all load it is fastai's wish
    twin = load_learner(learn.path/'rank0.pkl')
    assert twin.run_bn._sync is None
    assert torch.equal(twin.model[2].running_mean, learn.model[2].running_mean)
    with learn.distrib_ctx(cpu=True), learn.no_logging():
        if what=='step': learn.fit(1, cbs=[*cbs,check])
said = [str(w.message) for w in got if 'sync_bn' in str(w.message)]
w = learn.model[0].weight.detach().clone()
all_ = [torch.empty_like(w) for _ in range(2)]
dist.all_gather(all_, w)
res = dict(calls=check.calls, said=said, same=torch.equal(*all_),
    types=[type(m).__name__ for m in learn.model if hasattr(m, 'running_mean')],
    window=repr(learn.model[2].window), seen=learn.model[2].samples_seen.item(),
    batches=learn.model[2].num_batches_tracked.item())
Path(f'{out}/{dist.get_rank()}.json').write_text(json.dumps(res))
# a Learner and its callbacks hold each other, and with them the group,
# whose threads may abort in the interpreter's own end
del learn
gc.collect()
dist.barrier()
dist.destroy_process_group()
threads = [o.read_text() for o in Path('/proc/self/task').glob('*/comm')] # on Linux
assert not any('gloo' in o for o in threads)
'''

launchers = {
    'torchrun':'torch.distributed.run --standalone --nproc-per-node 2',
    'accelerate':'accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 '
        '--mixed_precision no --dynamo_backend no --main_process_port 0'}

def launched(launcher, what, tmp_path, script=script):
    "What each of two ranks writes, that run `script`"
    import json
    (tmp_path/'train.py').write_text(script)
    program = [sys.executable,'-m',*launchers[launcher].split()]
    args = [tmp_path/'train.py',what,root/'tests',tmp_path]
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'}
    env |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(root),
        PYTHONWARNINGS='ignore', PYTHONFAULTHANDLER='1')
    p = subprocess.Popen([*program,*map(str, args)],
        cwd=tmp_path, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try: out,_ = p.communicate(timeout=120)
    finally:
        if p.poll() is None: os.killpg(p.pid, 9)
    assert p.returncode==0, out[-4000:]
    return [json.loads((tmp_path/f'{r}.json').read_text()) for r in range(2)]

@pytest.mark.parametrize('launcher,what',
    [('torchrun','step'), ('accelerate','accumulation'), ('torchrun','layer')], ids=str)
def test_learner_in_distrib_ctx(launcher, what, tmp_path):
    """Windows equal after each step, one collective each; sync_bn off, with one line from rank 0;
    parameters equal; rank 0 saves alone"""
    a,b = launched(launcher, what, tmp_path)
    assert a['same'] and len(a['types'])==5
    assert set(a['types'])=={'RunningBatchNorm2d'}
    lines = 2 if what=='step' else 1 # one for each distrib_ctx
    assert len(a['said'])==lines and not b['said']
    for k in ('seen','batches','calls'): assert a[k]==b[k]
    n = len(a['calls'])
    if what=='step':
        assert set(a['calls'])=={1}
        assert a['batches']==n and a['seen']==4*n
        assert a['window']=='AdaptiveWindow(200)'
    if what=='accumulation':
        steps,rest = divmod(n, 4)
        assert a['calls']==[0,0,0,1]*steps+[0]*rest
        assert a['batches']==steps
        assert a['window']=='AdaptiveWindow(200)'
    if what=='layer': assert set(a['calls'])=={10}

loops = '''
import gc,json,logging,sys,torch
from contextlib import nullcontext
from pathlib import Path
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP
from fastai_runbn.bench.tasks import lesson10_convnet
from fastai_runbn.filters import FilterMeans
from fastai_runbn.distributed import sync_window
from fastai_runbn.layers import running_norms
from fastai_runbn.surgery import to_runbn
what,tests,out = sys.argv[1:]
logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
dist.init_process_group('gloo')
rank,n = dist.get_rank(),2
torch.manual_seed(1+rank)
mine = [(torch.randn(2,1,28,28)+rank,torch.randint(10, (2,))) for _ in range(12)]
def net():
    torch.manual_seed(0)
    return lesson10_convnet()
def by_hand():
    model = to_runbn(net())
    opt = torch.optim.SGD(model.parameters(), .02)
    FilterMeans(model).on(opt)
    sync,ddp = sync_window(model),DDP(model)
    for i,(x,y) in enumerate(mine, 1):
        with ddp.no_sync() if i%n else nullcontext(): (cross_entropy(ddp(x), y)/n).backward()
        if not i%n:
            opt.step()
            opt.zero_grad()
    sync.settle()
    return model
def by_accelerate():
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=n)
    model = net()
    opt = torch.optim.SGD(model.parameters(), .02)
    FilterMeans(to_runbn(model)).on(opt)
    sync = sync_window(model)
    model,opt = accelerator.prepare(model, opt)
    for x,y in mine:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(x), y))
            opt.step()
            opt.zero_grad()
    sync.settle()
    return accelerator.unwrap_model(model)
def by_lightning():
    import lightning as L
    from fastai_runbn.lightning import RunBNLightning
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = net()
        def training_step(self, b, i): return cross_entropy(self.model(b[0]), b[1])
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .02)
    module = Module()
    quiet = dict(logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(max_epochs=1, accelerator='cpu', devices=2, strategy='ddp',
        callbacks=RunBNLightning(), accumulate_grad_batches=n,
        use_distributed_sampler=False, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(mine, batch_size=None))
    return module.model
def off(a, b): return max((x-y).abs().max().item() for x,y in zip(a, b))
def values(model):
    windows = [m.window_mean for m in running_norms(model)]
    return torch.cat([t.detach().flatten() for t in (*model.parameters(),*windows)])
hand,theirs = by_hand(),globals()[f'by_{what}']()
v = values(theirs)
all_ = [torch.empty_like(v) for _ in range(2)]
dist.all_gather(all_, v)
alone = net()
res = dict(off=off([values(hand)], [v]), same=torch.equal(*all_),
    moved=off(hand.parameters(), alone.parameters()),
    batches=[m.num_batches_tracked.item() for m in running_norms(theirs)])
Path(f'{out}/{rank}.json').write_text(json.dumps(res))
gc.collect()
dist.barrier()
dist.destroy_process_group()
'''

@pytest.mark.parametrize('what', ['accelerate','lightning'])
def test_other_loops_on_two_ranks(what, tmp_path):
    """Weights and windows as a loop by hand has them, with DDP and two batches a step,
    and the same on both ranks"""
    for r in launched('torchrun', what, tmp_path, loops):
        assert r['same'] and r['batches']==[6]*5
        assert r['off']<1e-6 and r['moved']>.01
