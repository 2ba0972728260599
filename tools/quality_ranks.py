"""The quality study's small ResNet on several ranks, each with batches of `--bs`, for each `sync`
of RunBNCallback; a line of JSON a trial, on a CPU

torchrun --standalone --nproc-per-node 2 tools/quality_ranks.py OUT.jsonl --data PHOTOGRAPHS
"""
import argparse,json,math,sys,time,warnings
from pathlib import Path
warnings.filterwarnings('ignore')
import torch, torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs
from fastai.basics import Learner,accuracy,set_seed
from fastai.distributed import DistributedDL
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastai_runbn.bench.quality import regimes,ScoreRecorder
from fastai_runbn.callback import RunBNCallback
from fastai_runbn.distributed import window_sync

def on_a_cpu(self, t, rank):
    "fastai's own puts the order of the samples on a GPU"
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()

syncs = { # name: sync of RunBNCallback, broadcast_buffers of DDP
    'step':('step',True), 'layer':('layer',True),
    'None':(None,False),     # each rank its own window
    'broadcast':(None,True), # rank 0's window for all, from each forward on
}

def trial(regime, sync, bs, lr, seed, data, epochs):
    "Train on all ranks; rank 0's model on the whole validation set by itself"
    r = regimes[regime]
    mode,broadcast = syncs[sync]
    start = time.perf_counter()
    scores = ScoreRecorder()
    set_seed(seed)
    model,dls = r.model(data),r.loaders(bs, data)
    cbs = [RunBNCallback(sync=mode),scores]
    learn = Learner(dls, model, metrics=r.metric, opt_func=r.opt, cbs=cbs)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=broadcast)
    on_ranks = learn.distrib_ctx(cpu=True, sync_bn=False, kwargs_handlers=[ddp])
    with on_ranks,learn.no_bar(),learn.no_logging():
        r.train(learn, epochs or r.epochs, lr)
    attached = window_sync(learn.model)
    assert (attached.mode if attached else None)==mode
    model = learn.model.eval()
    def of_batch(x, y):
        "Its loss, how many are right, and how many there are"
        p = model(x)
        loss = float(learn.loss_func(p, y))*len(y)
        return loss,float((p.argmax(1)==y).sum()),len(y)
    with torch.no_grad():
        batches = [of_batch(x, y) for x,y in learn.dls.valid]
    loss,right,n = map(sum, zip(*batches))
    mean_loss = loss/n if math.isfinite(loss) else None
    seconds = round(time.perf_counter()-start, 1)
    world = dist.get_world_size()
    return dict(regime=regime, norm=f"ours, sync={sync}", sync=sync, ranks=world,
        bs=bs, lr=lr, seed=seed,
        score=right/n, curve=scores.values, loss=mean_loss,
        seconds=seconds, epochs=epochs or r.epochs)

apart = 'regime','sync','ranks','bs','lr','seed','epochs' # what tells trials apart

def main():
    p = argparse.ArgumentParser(description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', help='file of JSON lines; trials that are in it are not run again')
    p.add_argument('--data', help='folder or tar of photographs, as `photos_dls` takes it')
    choices = [k for k,r in regimes.items() if not r.accumulate and k!='R4']
    p.add_argument('--regime', default='R2', choices=choices)
    p.add_argument('--syncs', default='step,layer,None', help=f'of {", ".join(syncs)}')
    p.add_argument('--rates', default=None, help="learning rates; default: the regime's")
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--bs', type=int, default=2, help='samples of a batch on each rank')
    p.add_argument('--epochs', type=int, default=None, help="default: the regime's")
    a = p.parse_args()
    torch.set_num_threads(1)
    DistributedDL._broadcast = on_a_cpu
    dist.init_process_group('gloo')
    rank,world = dist.get_rank(),dist.get_world_size()
    rates = regimes[a.regime].rates
    if a.rates: rates = [float(o) for o in a.rates.split(',')]
    epochs = a.epochs or regimes[a.regime].epochs
    out = Path(a.out)
    lines = out.read_text().splitlines() if out.exists() else []
    rows = map(json.loads, lines)
    done = [[tuple(o[k] for k in apart) for o in rows]]
    dist.broadcast_object_list(done, 0)
    for seed in range(a.seeds):
        for lr in rates:
            for sync in a.syncs.split(','):
                if (a.regime,sync,world,a.bs,lr,seed,epochs) in done[0]: continue
                row = trial(a.regime, sync, a.bs, lr, seed,
                    data=a.data, epochs=a.epochs)
                if rank==0:
                    with open(out, 'a') as f:
                        f.write(json.dumps(row)+'\n')
                    shown = {k:v for k,v in row.items() if k!='curve'}
                    print(shown, flush=True)
                dist.barrier() # rank 0 may have had more to do
    dist.destroy_process_group()

if __name__=='__main__': main()
