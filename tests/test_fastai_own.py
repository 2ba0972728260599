"""What fastai's own notebooks test of schedules (14), trackers (17), fp16 (18)
and training callbacks (18a), with a converted convnet in the place of theirs"""
import math,os,warnings
import numpy as np,pytest,torch
from fastai.callback.all import (Callback,EarlyStoppingCallback,GradientAccumulation,GradientClip,
    ReduceLROnPlateau,SaveModelCallback,ShortEpochCallback,TerminateOnNaNCallback,combined_cos)
from fastai.basics import DataLoaders,Learner,SGD,default_device,set_seed
from torch import nn
from torch.utils.data import TensorDataset
from fastai_runbn.all import RunBNCallback
from learners import running,state

def synth(bs=16, n=8, path=None, cbs=(), **kw):
    """Images of one channel whose mean brightness is to be found, and a small convnet with norms;
    fastai's synth_learner with something to normalise"""
    set_seed(0)
    size = bs*n+40
    noise = torch.randn(size,1,8,8)
    brightness = torch.randn(size,1,1,1)
    x = noise*.5+brightness
    y = x.mean((1,2,3))[:,None]
    train = TensorDataset(x[:-40], y[:-40])
    valid = TensorDataset(x[-40:], y[-40:])
    dls = DataLoaders.from_dsets(train, valid, bs=bs,
        device=default_device(), drop_last=False)
    def block(c, nf):
        return nn.Conv2d(c,nf,3),nn.BatchNorm2d(nf),nn.ReLU()
    body = *block(1, 6),*block(6, 8)
    head = nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(8,1)
    model = nn.Sequential(*body, *head)
    learn = Learner(dls, model, loss_func=nn.MSELoss(), opt_func=SGD,
        cbs=[RunBNCallback(),*cbs], **{'lr':.05, **kw})
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    if path: learn.path = path
    return learn

# 14: schedules

def test_fit_one_cycle_sets_its_schedule():
    learn = synth()
    learn.fit_one_cycle(2, lr_max=.1)
    assert len(running(learn)) == 2
    n = 2*len(learn.dls.train)
    lr = combined_cos(.25, .1/25, .1, .1/1e5)
    assert len(learn.recorder.hps['lr']) == n
    want = [lr(i/n) for i in range(n)]
    np.testing.assert_allclose(learn.recorder.hps['lr'], want, rtol=1e-5)

fits = dict(
    flat_cos=(lambda l: l.fit_flat_cos(2), 2),
    sgdr=(lambda l: l.fit_sgdr(2, 1), 3),
    fine_tune=(lambda l: l.fine_tune(1), 1))
@pytest.mark.parametrize('how,epochs', fits.values(), ids=fits)
def test_other_fits_run_their_length(how, epochs):
    learn = synth()
    how(learn)
    assert len(learn.recorder.hps['lr']) == epochs*len(learn.dls.train)
    assert len(running(learn)) == 2

def test_lr_find_goes_up_and_restores(tmp_path):
    learn = synth(path=tmp_path)
    before = {k:v.clone()
        for k,v in learn.model.state_dict().items()}
    learn.lr_find(num_it=16, show_plot=False, suggest_funcs=())
    lrs = np.array(learn.recorder.lrs)
    growth = lrs[1:]/lrs[:-1]
    np.testing.assert_allclose(growth, growth[0], rtol=1e-3)
    assert lrs[0] == pytest.approx(1e-7, rel=1e-2)
    for k,v in learn.model.state_dict().items():
        assert torch.equal(v, before[k]), k
    assert not list((tmp_path/'models').glob('*/_tmp.pth'))              # no left-overs
    first = learn.validate()[0]
    learn.fit(3)
    assert learn.recorder.values[-1][1] < first

# 17: trackers

def test_terminate_on_nan_stops_at_once():
    learn = synth()
    learn.fit(10, lr=1e20, cbs=TerminateOnNaNCallback())
    assert len(learn.recorder.losses) < 10*len(learn.dls.train)
    assert all(math.isfinite(l) for l in learn.recorder.losses)
    # what fastai's test cannot ask of BatchNorm
    buffers = [b for m in running(learn) for b in m.buffers()]
    assert all(b.isfinite().all() for b in buffers)

unmet = dict(monitor='valid_loss', min_delta=100., patience=2) # no loss falls by 100

def test_early_stopping_stops_after_its_patience():
    learn = synth()
    learn.fit(50, lr=1e-9, cbs=EarlyStoppingCallback(**unmet))
    assert len(learn.recorder.values) == 3

@pytest.mark.parametrize('kw,files',
    [(dict(every_epoch=True),['model_0.pth','model_1.pth']),
    (dict(every_epoch=2),['model_0.pth']),
    (dict(at_end=True),['model.pth'])], ids=str)
def test_save_model_writes_its_files(kw, files, tmp_path):
    learn = synth(path=tmp_path)
    learn.fit(2, cbs=SaveModelCallback(**kw))
    assert set(files) <= set(os.listdir(tmp_path/'models'))

def test_reduce_lr_on_plateau_divides():
    learn = synth()
    learn.fit(4, lr=1e-7, cbs=ReduceLROnPlateau(**unmet))
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(1e-8)
    learn = synth()
    learn.fit(6, lr=5e-8, cbs=ReduceLROnPlateau(**unmet, min_lr=1e-8))
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(1e-8)

# 18: mixed precision, on a CPU a matter of not being in the way

@pytest.mark.parametrize('to', ['to_fp16','to_bf16'])
def test_mixed_precision_on_a_cpu_trains_in_float32(to):
    learn = getattr(synth(), to)()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # torch's: no CUDA, so no autocast
        learn.fit(2)
    assert len(running(learn)) == 2
    first,last = learn.recorder.values[0],learn.recorder.values[-1]
    assert last[0] < first[0]
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())

# 18a: training

def test_short_epoch_is_short():
    learn = synth()
    learn.fit(1, cbs=ShortEpochCallback(.5))
    batches = running(learn)[0].num_batches_tracked.item()
    assert batches <= len(learn.dls.train)//2+1

def test_accumulating_one_batch_is_no_accumulation():
    "n_acc of one batch steps after every batch: the same weights as without"
    a,b = synth(),synth()
    a.fit(2)
    b.fit(2, cbs=GradientAccumulation(16))
    for (k,p),q in zip(a.model.named_parameters(), b.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=k)

def test_accumulation_steps_when_enough_were_seen():
    learn = synth()
    class Moves(Callback):
        "After which batches the weights have moved"
        order,moved = 70,[]
        def before_batch(self):
            self.before = self.model[0].weight.detach().clone()
        def after_batch(self):
            if not self.training: return
            same = torch.equal(self.model[0].weight, self.before)
            self.moved.append(not same)
    learn.fit(1, cbs=[GradientAccumulation(64),Moves])
    assert Moves.moved == [False,False,False,True]*2

def test_gradient_clip_clips():
    seen = []
    class Norm(Callback):
        order = GradientClip.order+1
        def before_step(self):
            norms = [p.grad.norm() for p in self.model.parameters()]
            seen.append(torch.stack(norms).norm().item())
    learn = synth()
    learn.fit(1, cbs=[GradientClip(.01),Norm])
    assert len(seen) == 8 and all(s <= .0101 for s in seen)

def test_training_is_reproducible():
    "fastai's tests rest on it"
    a,b = synth(),synth()
    a.fit_one_cycle(2)
    b.fit_one_cycle(2)
    for k,v in state(a.model).items():
        assert torch.equal(v, state(b.model)[k]), k
