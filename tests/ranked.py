"What the ranks of tests/test_distributed.py run"
import io,os,pickle
from copy import deepcopy
import torch, torchvision, torch.distributed as dist
from contextlib import nullcontext
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint_sequential
from fastai_runbn.distributed import WindowSync
from fastai_runbn.distributed import sync_window
from fastai_runbn.moments import AdaptiveWindow,auto_momentum
from fastai_runbn.surgery import to_bn,to_runbn
from fastai_runbn.layers import RunningBatchNormMixin,RunningBatchNorm1d,RunningBatchNorm2d

def norms(model):
    return [m for m in model.modules() if isinstance(m, RunningBatchNormMixin)]
def buffers(model):
    "Copies of all that its running norms keep, by name"
    ours = [(n,m) for n,m in model.named_modules()
        if isinstance(m, RunningBatchNormMixin)]
    return {f'{n}.{k}':b.clone() for n,m in ours
        for k,b in m.named_buffers()}

def small(dtype=torch.float64, **kw):
    torch.manual_seed(0)
    def block(conv):
        return conv,RunningBatchNorm2d(conv.out_channels, **kw),nn.ReLU()
    body = (*block(nn.Conv2d(3,4,3)),
        *block(nn.Conv2d(4,6,3, bias=False)))
    head = (nn.AdaptiveAvgPool2d(2),nn.Flatten(),
        RunningBatchNorm1d(24, **kw),nn.Linear(24,5))
    return nn.Sequential(*body, *head).to(dtype)

def batches(steps, n, dtype=torch.float64, seed=1):
    "Of `n` samples each, the statistics drifting"
    g = torch.Generator().manual_seed(seed)
    def images(i):
        noise = torch.randn(n,3,10,10, generator=g, dtype=torch.float64)
        return noise.mul(1+.01*i).add(.05*i).to(dtype)
    def targets(): return torch.randint(5, (n,), generator=g)
    return [(images(i),targets()) for i in range(steps)]

def train(model, mine, opt, loss=nn.functional.cross_entropy):
    res = []
    for x,y in mine:
        opt.zero_grad()
        l = loss(model(x), y)
        l.backward()
        opt.step()
        res.append(l.detach())
    return torch.stack(res)

def equal_on_all(model):
    "Raise unless all buffers of the norms are the same on all ranks, to the bit"
    flat = [b.double().flatten() for b in buffers(model).values()]
    mine = torch.cat(flat)
    all_ = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_, mine)
    bits = mine.view(torch.int64)
    for r,o in enumerate(all_):
        said = f'rank {r} differs in {int((o!=mine).sum())} of {len(o)} values'
        assert torch.equal(o.view(torch.int64), bits), said

def bit_equal(rank, world, mode, steps, dtype, broadcast, bs=2, kw={}):
    model = small(dtype, **kw)
    sync = sync_window(model, mode)
    net = DDP(model, broadcast_buffers=broadcast)
    opt = torch.optim.SGD(net.parameters(), .05)
    for x,y in batches(steps, world*bs, dtype):
        mine = slice(rank*bs, (rank+1)*bs)
        train(net, [(x[mine],y[mine])], opt)
        sync.settle()
        equal_on_all(model)
    res = buffers(model)
    assert all(b.isfinite().all() for b in res.values())
    return res

class Schedule:
    "A pre-hook that sets `t` anew for each forward, as `RunBNSchedule` does"
    def __init__(self, t): self.t,self.n = t,0
    def __call__(self, *_):
        self.t.fill_(20.-self.n)
        self.n += 1

def as_one(rank, world, mode, steps, kw, scheduled=False):
    "Losses and the window of ranks that have two samples of each batch"
    model = small(**kw)
    if scheduled:
        shared = torch.zeros((), dtype=torch.float64)
        for m in norms(model): m.window = shared
    sync = sync_window(model, mode)
    net = DDP(model)
    if scheduled: model[0].register_forward_pre_hook(Schedule(shared))
    mine = slice(rank*2, rank*2+2)
    data = [(x[mine],y[mine])
        for x,y in batches(steps, 2*world)]
    opt = torch.optim.SGD(net.parameters(), .05)
    losses = train(net, data, opt)
    sync.settle()
    return losses,buffers(model)

def micro(rank, world, kw, sizes, steps, n_acc):
    """As `as_one`, for ranks with batches of `sizes`, `n_acc` of them a step, all but the last
    under `no_sync`; the loss is one over all samples of a step"""
    model = small(**kw)
    sync = sync_window(model, 'step')
    net = DDP(model)
    opt = torch.optim.SGD(net.parameters(), .05)
    losses,first = [],sum(sizes[:rank])
    mine = slice(first, first+sizes[rank])
    for i,(x,y) in enumerate(batches(steps*n_acc, sum(sizes))):
        if i%n_acc==0: opt.zero_grad()
        x,y = x[mine],y[mine]
        last = i%n_acc==n_acc-1
        with nullcontext() if last else net.no_sync():
            l = nn.functional.cross_entropy(net(x), y, reduction='sum')
            l = l/sum(sizes)/n_acc*world
            l.backward()
        losses.append(l.detach())
        if last:
            opt.step()
            sync.settle()
            equal_on_all(model)
    return torch.stack(losses),buffers(model)

class Count:
    "Counts collectives called from Python, and their bytes"
    names = ('all_reduce','broadcast','all_gather','all_gather_object','reduce',
        'all_gather_into_tensor','reduce_scatter_tensor')
    def __enter__(self):
        self.calls,self.bytes = [],0
        self.old = {n:getattr(dist, n) for n in self.names}
        def counted(name, f):
            def run(*args, **kwargs):
                self.calls.append(name)
                if torch.is_tensor(args[0]): self.bytes += args[0].nbytes
                return f(*args, **kwargs)
            return run
        for n,f in self.old.items():
            setattr(dist, n, counted(n, f))
        return self
    def __exit__(self, *args):
        for n,f in self.old.items(): setattr(dist, n, f)

def of_gloo(prof):
    "How many collectives gloo did"
    done = [e for e in prof.key_averages() if e.key.startswith('gloo:')]
    return sum(e.count for e in done if 'monitored' not in e.key)

def counted(rank, world, arch, mode, steps=2):
    """Collectives a step from Python, of them all that gloo did, bytes a step,
    running norms and their channels"""
    if arch=='efficientnet_b0':
        import timm
        model = timm.create_model(arch, num_classes=4)
    else: model = getattr(torchvision.models, arch)(num_classes=4)
    if mode!='BatchNorm': to_runbn(model)
    sync = sync_window(model, mode) if mode in ('step','layer') else None
    net = DDP(model, broadcast_buffers=False)
    def batch():
        return torch.randn(2,3,32,32),torch.randint(4, (2,))
    data = [batch() for _ in range(steps)]
    opt = torch.optim.SGD(net.parameters(), .01)
    train(net, data[:1], opt) # DDP arranges its buckets anew after the first step
    with Count() as count, torch.profiler.profile() as prof:
        train(net, data, opt)
    calls,nbytes = len(count.calls)/steps,count.bytes/steps
    channels = [m.num_features for m in norms(model)]
    return calls,of_gloo(prof)/steps,nbytes,len(channels),sum(channels)

def share_of(rank, world, x): return x.tensor_split(world)[rank]
def shares_of(rank, world, data):
    "Of each batch, what the rank has of it"
    def mine(t): return share_of(rank, world, t)
    return [(mine(x),mine(y)) for x,y in data]

def uneven(rank, world, mode, last):
    """Ranks whose last batch has `last[rank]` samples, against pooled moments;
    the windows stay equal"""
    model = small()
    sync = sync_window(model, mode)
    net = DDP(model)
    opt = torch.optim.SGD(net.parameters(), .05)
    data = batches(4, 2*world)
    train(net, shares_of(rank, world, data[:3]), opt)
    sync.settle()
    before = buffers(model)
    w = [p.detach().clone() for p in model.parameters()]
    mine = slice(sum(last[:rank]), sum(last[:rank+1]))
    batch = batches(1, sum(last), seed=9)[0]
    x,y = [t[mine] for t in batch]
    def loss(p, y):
        return nn.functional.cross_entropy(p, y, reduction='sum')/2
    train(net, [(x,y)], opt, loss)
    sync.settle()
    equal_on_all(model)
    return before,buffers(model),w

def bad_batch(rank, world, mode, bad):
    "A batch of the rank `bad` has a NaN in one channel; the windows afterwards"
    model = small(window=60)
    sync = sync_window(model, mode)
    net = DDP(model)
    opt = torch.optim.SGD(net.parameters(), 0.)
    data = shares_of(rank, world, batches(4, 2*world))
    for i,(x,y) in enumerate(data):
        if rank==bad and i==2:
            x[0,1,3,3] = float('nan')
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        sync.settle()
        equal_on_all(model)
    res = buffers(model)
    assert all(b.isfinite().all() for b in res.values())
    return res,[m.skipped_batches.item() for m in norms(model)]

def dies(rank, world, mode, path):
    """The last rank leaves in the middle of a step; what the others are told,
    and what is in a checkpoint that they write then"""
    model = small()
    sync = sync_window(model, mode)
    net = DDP(model)
    opt = torch.optim.SGD(net.parameters(), .05)
    data = shares_of(rank, world, batches(6, 2*world))
    train(net, data[:3], opt)
    torch.save(model.state_dict(), f'{path}/{rank}.pt')
    good = model.state_dict()
    good = {k:v.clone() for k,v in good.items() if 'running' in k}
    if rank==world-1: os._exit(1)
    try:
        train(net, data[3:], opt)
        sync.settle()
    except Exception as e: told = f'{type(e).__module__}.{type(e).__name__}: {e}'
    else: told = ''
    after = {k:v for k,v in model.state_dict().items() if k in good}
    same = all(torch.equal(good[k], after[k]) for k in good)
    finite = all(v.isfinite().all() for v in after.values())
    return told,same,finite

def refused(rank, world, what):
    "The error of ranks that do not fit together"
    model,mode = small(),'step'
    last = rank==world-1
    if what=='number' and last: model[4] = nn.BatchNorm2d(6).double()
    if what=='channels' and last: model[8] = RunningBatchNorm1d(25)
    if what=='names' and last:
        model = nn.Sequential(*model[:4], nn.Identity(), *model[4:])
    if what=='setting' and last: model[1].set_settings(running_grad=.5)
    if what=='mode' and last: mode = 'layer'
    try: sync_window(model, mode)
    except RuntimeError as e: return str(e)

def joined(rank, world, how):
    "Ranks with 5, 3, … batches"
    model,data = small(),batches(5, 2*world)
    sync = sync_window(model, 'layer' if how=='layer' else 'step')
    net = DDP(model)
    opt = torch.optim.SGD(net.parameters(), .05)
    mine = shares_of(rank, world, data[:5-2*rank])
    try:
        joining = net.join() if how=='net' else Join([net,sync])
        with joining: train(net, mine, opt)
    except RuntimeError as e: return str(e)
    sync.settle()
    equal_on_all(model)
    flat = [p.detach().flatten() for p in net.parameters()]
    p = torch.cat(flat)
    both = [torch.empty_like(p) for _ in range(world)]
    dist.all_gather(both, p)
    assert all(torch.equal(p, o) for o in both)
    first = norms(model)[0]
    return first.num_batches_tracked.item(),first.samples_seen.item()

class Branches(nn.Module):
    "Odd ranks leave a part out"
    def __init__(self):
        super().__init__()
        def branch():
            layers = nn.Conv2d(4,4,3),RunningBatchNorm2d(4)
            return nn.Sequential(*layers).double()
        self.stem = small()[:3]
        self.a,self.b = branch(),branch()
        self.head = nn.Linear(4,5).double()
    def forward(self, x):
        x = self.stem(x)
        x = self.a(x) if dist.get_rank()%2 else self.b(x)
        return self.head(x.mean((2,3)))

def wrapped(rank, world, kind):
    "Windows stay equal under DDP's options, and each step sends once"
    torch.manual_seed(0)
    model = Branches() if kind=='find_unused_parameters' else small()
    sync = sync_window(model, 'step')
    options = 'static_graph','find_unused_parameters','forward_sync_buffers'
    kw = {kind:True} if kind in options else {}
    net = DDP(model, **kw)
    if kind=='compiled': net = torch.compile(net, backend='aot_eager')
    opt = torch.optim.SGD(net.parameters(), .05)
    for batch in shares_of(rank, world, batches(5, 2*world)):
        with Count() as count: train(net, [batch], opt)
        assert count.calls==['all_reduce'], count.calls
        sync.settle()
        equal_on_all(model)
    return buffers(model)

def local(rank, world, broadcast):
    """`sync=None`: windows before and after a forward,
    which with `broadcast_buffers` begins with rank 0's"""
    model = small(window=AdaptiveWindow())
    assert sync_window(model, None) is None
    net = DDP(model, broadcast_buffers=broadcast)
    data = shares_of(rank, world, batches(4, 2*world))
    opt = torch.optim.SGD(net.parameters(), .05)
    train(net, data[:3], opt)
    before = buffers(model)
    net.eval()
    with torch.no_grad(): net(data[3][0])
    return before,buffers(model)

def read_by_one(rank, world, how, broadcast):
    "Only rank 0 reads between steps"
    model = small()
    sync = sync_window(model, 'step')
    net = DDP(model, broadcast_buffers=broadcast)
    opt = torch.optim.SGD(net.parameters(), .05)
    for i,(x,y) in enumerate(batches(6, 2*world)):
        train(net, shares_of(rank, world, [(x,y)]), opt)
        if rank==0 and i%2:
            if how=='state_dict': net.state_dict()
            if how=='pickle':
                twin = pickle.loads(pickle.dumps(model))
                assert not isinstance(twin[1].keeper, WindowSync)
            if how=='deepcopy':
                twin = deepcopy(model)
                twin(x); twin.eval()(x) # without the others
            if how=='save': torch.save(model, io.BytesIO())
            if how=='export':
                torch.export.export(deepcopy(model).eval(), (x,))
            if how=='evaluate':
                model.eval()(x)
                model.train()
    sync.settle()
    equal_on_all(model)
    return buffers(model)

def near(have, want):
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)

def no_gradient(rank, world):
    "Forwards without a backward send, too: `update_bn`"
    model = small()
    sync = sync_window(model, 'step')
    with torch.no_grad():
        with Count() as count:
            for x,_ in batches(3, 2*world):
                model(share_of(rank, world, x))
        assert count.calls==['all_reduce']*3, count.calls
        model.eval()(x)
    equal_on_all(model)
    return buffers(model)

def twice(rank, world):
    "Two forwards before one backward are one collective, and pooled"
    model = small()
    sync = sync_window(model, 'step')
    (x,_),(z,_) = batches(2, 2*world)
    mine,mine_too = (share_of(rank, world, o) for o in (x,z))
    with Count() as count:
        loss = model(mine).sum()-2*model(mine_too).sum()
        loss.backward()
    assert count.calls==['all_reduce'], count.calls
    sync.settle()
    equal_on_all(model)
    conv = model[0]
    convs = torch.cat([conv(x),conv(z)]).detach()
    dims = 0,2,3
    near(model[1].window_mean, convs.mean(dims))
    near(model[1].window_var, convs.var(dims, correction=0))

def again(rank, world, mode, times):
    "Gradients and windows after `times` backwards of each forward, of as many parts of the loss"
    model = small()
    sync = sync_window(model, mode)
    grads = []
    for x,y in shares_of(rank, world, batches(12, 2*world)):
        out = model(x)
        losses = (nn.functional.cross_entropy(out, y),
            out.square().mean(),out[0].sum())
        model.zero_grad()
        if times==1: sum(losses).backward()
        else:
            for l in losses: l.backward(retain_graph=True)
        flat = [p.grad.flatten() for p in model.parameters()]
        grads.append(torch.cat(flat))
    sync.settle()
    equal_on_all(model)
    return torch.stack(grads),buffers(model)

def checkpointed(rank, world, mode, reentrant):
    """Windows of a model whose activations are checkpointed, `reentrant` or not
    (`None`: not checkpointed)"""
    model = small()
    sync = sync_window(model, mode)
    opt = torch.optim.SGD(model.parameters(), .0)
    for x,y in shares_of(rank, world, batches(4, 2*world)):
        x.requires_grad_()
        net = model if reentrant is None else Whole(model, reentrant)
        with Count() as count:
            nn.functional.cross_entropy(net(x), y).backward()
        if mode=='step': assert len(count.calls)==1, count.calls
        sync.settle()
        equal_on_all(model)
    return buffers(model)

class Whole(nn.Module):
    "Checkpoints `model` in two parts"
    def __init__(self, model, reentrant):
        super().__init__()
        self.model,self.reentrant = model,reentrant
    def forward(self, x):
        def in_parts(x):
            return checkpoint_sequential(list(self.model), 2, x,
                use_reentrant=self.reentrant)
        run = self.model.forward
        self.model.forward = in_parts
        try: return self.model(x)
        finally: self.model.forward = run

def back_to_bn(rank, world):
    "`to_bn` merges what is on its way, and lets go"
    model = to_runbn(nn.Sequential(
        nn.Conv2d(3,4,3), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(256,5)).double())
    for p in model.parameters(): dist.broadcast(p.data, 0)
    sync = sync_window(model, 'step')
    data = batches(1, 2*world)
    opt = torch.optim.SGD(model.parameters(), 0.)
    train(model, shares_of(rank, world, data), opt)
    assert sync.sent is not None
    to_bn(model)
    norm = model[1]
    assert type(norm) is nn.BatchNorm2d and 'keeper' not in vars(norm)
    assert norm.num_batches_tracked==1
    x = data[0][0]
    convs = model[0](x)
    near(norm.running_mean, convs.mean((0,2,3)))
    model(x).sum().backward() # no collective
    return True

def fsdp(rank, world, version):
    "Sharded parameters, whole windows"
    model = small(torch.float32)
    if version==2:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        net = fully_shard(model, mesh=init_device_mesh('cpu', (world,)))
    else:
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
        net = FSDP(model, device_id=torch.device('cpu'), use_orig_params=True)
    sync = sync_window(net, 'step')
    data = shares_of(rank, world, batches(5, 2*world, torch.float32))
    opt = torch.optim.SGD(net.parameters(), .05)
    losses = train(net, data, opt)
    sync.settle()
    equal_on_all(net)
    assert norms(net)[0].window_mean.shape==(4,)
    windows = {k.split('_fsdp_wrapped_module.')[-1]:v
        for k,v in buffers(net).items()}
    return losses,windows

def plain_ddp(rank, world):
    model = small(torch.float32)
    net,sync = DDP(model),sync_window(model, 'step')
    data = shares_of(rank, world, batches(5, 2*world, torch.float32))
    opt = torch.optim.SGD(net.parameters(), .05)
    losses = train(net, data, opt)
    sync.settle()
    return losses,buffers(model)

def held_and_copied(rank, world, mode):
    """What moves in forwards with momentum 0; and where windows go when others copy statistics
    into a model while a collective may be on its way"""
    model = small()
    sync = sync_window(model, mode)
    data = shares_of(rank, world, batches(12, 2*world))
    def step(x, y):
        nn.functional.cross_entropy(model(x), y).backward()
    for x,y in data[:6]: step(x, y)
    sync.settle()
    before = buffers(model)
    for m in norms(model): m.momentum = 0
    for x,y in data[6:8]: step(x*3, y)
    sync.settle()
    moved = [k for k,b in buffers(model).items()
        if not torch.equal(b, before[k])]
    for m in norms(model): m.momentum = auto_momentum
    step(*data[8])
    for m in norms(model)[:1]: # one layer's statistics, not those of the others
        m.running_mean.fill_(5.); m.running_var.fill_(2.)
    for x,y in data[9:10]: step(x, y)
    sync.settle()
    equal_on_all(model)
    seen = [m.samples_seen.item() for m in norms(model)]
    return moved,norms(model)[0].window_mean,seen
