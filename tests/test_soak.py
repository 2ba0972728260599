"20,000 steps with random batch sizes and learning rates: no drift, no growth"
import gc,tracemalloc
import numpy as np,torch
from torch import nn
from fastai_runbn.layers import RunningBatchNorm1d
from oracle import Oracle

steps,look = 20_000,2_000

def test_20000_steps():
    """The window follows the oracle's, fed with the same float32 activations;
    memory and the number of tensors stay where they were"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1) # vectors of six: a second thread only waits
    rng = np.random.default_rng(0)
    net = nn.Sequential(nn.Linear(4,6), RunningBatchNorm1d(6),
        nn.ReLU(), nn.Linear(6,2))
    norm,oracle,seen = net[1],Oracle(6),[]
    def note(m, args): seen.append(args[0].detach())
    norm.register_forward_pre_hook(note)
    opt = torch.optim.SGD(net.parameters(), .1)
    drift,memory,tensors = 0,[],[]
    sizes = rng.integers(1, 17, steps).tolist()
    rates = 10**rng.uniform(-4, -1, steps)
    for step,(bs,lr) in enumerate(zip(sizes, rates), 1):
        opt.param_groups[0]['lr'] = lr
        x = torch.randn(bs,4)*2+1
        opt.zero_grad()
        y = (x[:,0]>x[:,1]).long()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        h = seen.pop()
        oracle.step(h, torch.zeros_like(h))
        if step%look==0:
            mean,var = oracle.statistics()
            off_mean = (norm.window_mean.double().numpy()-mean)/np.sqrt(var)
            off_var = norm.window_var.double().numpy()/var-1
            drift = max(drift, *(np.abs(o).max() for o in (off_mean,off_var)))
            gc.collect()
            if step==6*look: tracemalloc.start()
            if step>=6*look:
                memory.append(tracemalloc.get_traced_memory()[0])
                there = (issubclass(type(o), torch.Tensor) for o in gc.get_objects())
                tensors.append(sum(there))
    tracemalloc.stop()
    torch.set_num_threads(threads)
    print(f'drift {drift:.1e}, tensors {tensors}, bytes {memory}')
    assert drift < 1e-5
    assert max(tensors) == min(tensors)
    # the oracle's and pytest's own small change; one tensor a step would be over 1 MB
    assert memory[-1]-memory[1] < 20_000
    assert all(p.isfinite().all() for p in net.parameters())
    assert norm.num_batches_tracked.item() == steps
