"What the ranks of tests/test_distributed.py run"
import torch, torchvision, torch.distributed as dist
from contextlib import nullcontext
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from fastai_runbn.distributed import sync_window
from fastai_runbn.surgery import to_bn,to_runbn
from fastai_runbn.layers import RunningBatchNormMixin,RunningBatchNorm1d,RunningBatchNorm2d

def norms(model): return [m for m in model.modules() if isinstance(m, RunningBatchNormMixin)]
def buffers(model): return {f'{n}.{k}':b.clone() for n,m in model.named_modules() if isinstance(m, RunningBatchNormMixin) for k,b in m.named_buffers()}

def small(dtype=torch.float64, **kw):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,4,3), RunningBatchNorm2d(4, **kw), nn.ReLU(), nn.Conv2d(4,6,3, bias=False), RunningBatchNorm2d(6, **kw), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         RunningBatchNorm1d(24, **kw), nn.Linear(24,5)).to(dtype)

def batches(steps, n, dtype=torch.float64, seed=1):
    "Of `n` samples each, the statistics drifting"
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n,3,10,10, generator=g, dtype=torch.float64).mul(1+.01*i).add(.05*i).to(dtype),torch.randint(5, (n,), generator=g)) for i in range(steps)]

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
    mine = torch.cat([b.double().flatten() for b in buffers(model).values()])
    all_ = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_, mine)
    for r,o in enumerate(all_): assert torch.equal(o.view(torch.int64), mine.view(torch.int64)), f'rank {r} differs in {int((o!=mine).sum())} of {len(o)} values'

def bit_equal(rank, world, mode, steps, dtype, broadcast, bs=2, kw={}):
    model = small(dtype, **kw)
    sync = sync_window(model, mode)
    net = DDP(model, broadcast_buffers=broadcast)
    opt = torch.optim.SGD(net.parameters(), .05)
    for x,y in batches(steps, world*bs, dtype):
        train(net, [(x[rank*bs:(rank+1)*bs], y[rank*bs:(rank+1)*bs])], opt)
        sync.settle()
        equal_on_all(model)
    res = buffers(model)
    assert all(b.isfinite().all() for b in res.values())
    return res

def as_one(rank, world, mode, steps, kw):
    "Losses and the window of ranks that have two samples of each batch"
    model = small(**kw)
    sync = sync_window(model, mode)
    net = DDP(model)
    losses = train(net, [(x[rank*2:rank*2+2],y[rank*2:rank*2+2]) for x,y in batches(steps, 2*world)], torch.optim.SGD(net.parameters(), .05))
    sync.settle()
    return losses,buffers(model)

def micro(rank, world, kw, sizes, steps, n_acc):
    "As `as_one`, for ranks with batches of `sizes`, `n_acc` of them a step, all but the last under `no_sync`; the loss is one over all samples of a step"
    model = small(**kw)
    sync = sync_window(model, 'step')
    net = DDP(model)
    opt,losses,first = torch.optim.SGD(net.parameters(), .05),[],sum(sizes[:rank])
    for i,(x,y) in enumerate(batches(steps*n_acc, sum(sizes))):
        if i%n_acc==0: opt.zero_grad()
        x,y = x[first:first+sizes[rank]],y[first:first+sizes[rank]]
        last = i%n_acc==n_acc-1
        with nullcontext() if last else net.no_sync():
            l = nn.functional.cross_entropy(net(x), y, reduction='sum')/sum(sizes)/n_acc*world
            l.backward()
        losses.append(l.detach())
        if last:
            opt.step()
            sync.settle()
            equal_on_all(model)
    return torch.stack(losses),buffers(model)

class Count:
    "Counts collectives called from Python, and their bytes"
    names = 'all_reduce','broadcast','all_gather','all_gather_object','reduce','all_gather_into_tensor','reduce_scatter_tensor'
    def __enter__(self):
        self.calls,self.bytes,self.old = [],0,{n:getattr(dist, n) for n in self.names}
        def counted(name, f):
            def run(*args, **kwargs):
                self.calls.append(name)
                if torch.is_tensor(args[0]): self.bytes += args[0].nbytes
                return f(*args, **kwargs)
            return run
        for n,f in self.old.items(): setattr(dist, n, counted(n, f))
        return self
    def __exit__(self, *args):
        for n,f in self.old.items(): setattr(dist, n, f)

def of_gloo(prof): return sum(e.count for e in prof.key_averages() if e.key.startswith('gloo:') and 'monitored' not in e.key)

def counted(rank, world, arch, mode, steps=3):
    "Collectives a step from Python, of them all that gloo did, bytes a step, running norms and their channels"
    if arch=='efficientnet_b0':
        import timm
        model = timm.create_model(arch, num_classes=4)
    else: model = getattr(torchvision.models, arch)(num_classes=4)
    if mode!='BatchNorm': to_runbn(model)
    sync = sync_window(model, mode) if mode in ('step','layer') else None
    net = DDP(model, broadcast_buffers=False)
    data = [(torch.randn(2,3,32,32),torch.randint(4, (2,))) for _ in range(steps)]
    opt = torch.optim.SGD(net.parameters(), .01)
    train(net, data[:2], opt) # DDP arranges its buckets anew after the first step
    with Count() as count, torch.profiler.profile() as prof: train(net, data, opt)
    return len(count.calls)/steps,of_gloo(prof)/steps,count.bytes/steps,len(norms(model)),sum(m.num_features for m in norms(model))
