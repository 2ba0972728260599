"What fastai's own notebooks test of schedules (14), trackers (17), fp16 (18) and training callbacks (18a), with a converted convnet in the place of theirs"
import math,os,warnings
import numpy as np,pytest,torch
from fastai.callback.all import Callback,EarlyStoppingCallback,GradientAccumulation,GradientClip,ReduceLROnPlateau,SaveModelCallback,ShortEpochCallback,TerminateOnNaNCallback,combined_cos
from fastai.basics import DataLoaders,Learner,SGD,default_device,set_seed
from torch import nn
from torch.utils.data import TensorDataset
from fastai_runbn.all import RunBNCallback
from learners import running,state

def synth(bs=16, n=8, path=None, cbs=(), **kw):
    "Images of one channel whose mean brightness is to be found, and a small convnet with norms; fastai's synth_learner with something to normalise"
    set_seed(0)
    x = torch.randn(bs*n+40,1,8,8)*.5+torch.randn(bs*n+40,1,1,1)
    y = x.mean((1,2,3))[:,None]
    dls = DataLoaders.from_dsets(TensorDataset(x[:-40],y[:-40]), TensorDataset(x[-40:],y[-40:]), bs=bs, device=default_device(), drop_last=False)
    model = nn.Sequential(nn.Conv2d(1,6,3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6,8,3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,1))
    learn = Learner(dls, model, loss_func=nn.MSELoss(), opt_func=SGD, cbs=[RunBNCallback(),*cbs], **{'lr':.05, **kw})
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
    np.testing.assert_allclose(learn.recorder.hps['lr'], [lr(i/n) for i in range(n)], rtol=1e-5)

@pytest.mark.parametrize('how,epochs', [(lambda l: l.fit_flat_cos(2), 2), (lambda l: l.fit_sgdr(2, 1), 3), (lambda l: l.fine_tune(1), 1)], ids=['flat_cos','sgdr','fine_tune'])
def test_other_fits_run_their_length(how, epochs):
    learn = synth()
    how(learn)
    assert len(learn.recorder.hps['lr']) == epochs*len(learn.dls.train) and len(running(learn)) == 2

def test_lr_find_goes_up_and_restores(tmp_path):
    learn = synth(path=tmp_path)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    learn.lr_find(num_it=16, show_plot=False, suggest_funcs=())
    lrs = np.array(learn.recorder.lrs)
    np.testing.assert_allclose(lrs[1:]/lrs[:-1], lrs[1]/lrs[0], rtol=1e-3)
    assert lrs[0] == pytest.approx(1e-7, rel=1e-2)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
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
    assert all(b.isfinite().all() for m in running(learn) for b in m.buffers()) # what fastai's test cannot ask of BatchNorm

def test_early_stopping_stops_after_its_patience():
    learn = synth()
    learn.fit(50, lr=1e-9, cbs=EarlyStoppingCallback(monitor='valid_loss', min_delta=100., patience=2))
    assert len(learn.recorder.values) == 3

@pytest.mark.parametrize('kw,files', [(dict(every_epoch=True),['model_0.pth','model_1.pth']), (dict(every_epoch=2),['model_0.pth']), (dict(at_end=True),['model.pth'])], ids=str)
def test_save_model_writes_its_files(kw, files, tmp_path):
    learn = synth(path=tmp_path)
    learn.fit(2, cbs=SaveModelCallback(**kw))
    assert set(files) <= set(os.listdir(tmp_path/'models'))

def test_reduce_lr_on_plateau_divides():
    learn = synth()
    learn.fit(4, lr=1e-7, cbs=ReduceLROnPlateau(monitor='valid_loss', min_delta=100., patience=2))
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(1e-8)
    learn = synth()
    learn.fit(6, lr=5e-8, cbs=ReduceLROnPlateau(monitor='valid_loss', min_delta=100., patience=2, min_lr=1e-8))
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(1e-8)

# 18: mixed precision, on a CPU a matter of not being in the way

@pytest.mark.parametrize('to', ['to_fp16','to_bf16'])
def test_mixed_precision_on_a_cpu_trains_in_float32(to):
    learn = getattr(synth(), to)()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                  # torch's: no CUDA, so no autocast
        learn.fit(2)
    assert len(running(learn)) == 2 and learn.recorder.values[-1][0] < learn.recorder.values[0][0]
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())

# 18a: training

def test_short_epoch_is_short():
    learn = synth()
    learn.fit(1, cbs=ShortEpochCallback(.5))
    assert running(learn)[0].num_batches_tracked.item() <= len(learn.dls.train)//2+1

def test_accumulating_one_batch_is_no_accumulation():
    "n_acc of one batch steps after every batch: the same weights as without"
    a,b = synth(),synth()
    a.fit(2)
    b.fit(2, cbs=GradientAccumulation(16))
    for (k,p),q in zip(a.model.named_parameters(), b.model.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=k)

def test_accumulation_steps_when_enough_were_seen():
    learn = synth()
    class Moves(Callback):
        "After which batches the weights have moved"
        order,moved = 70,[]
        def before_batch(self): self.before = self.model[0].weight.detach().clone()
        def after_batch(self):
            if self.training: self.moved.append(not torch.equal(self.model[0].weight, self.before))
    learn.fit(1, cbs=[GradientAccumulation(64),Moves])
    assert Moves.moved == [False,False,False,True]*2

def test_gradient_clip_clips():
    seen = []
    class Norm(Callback):
        order = GradientClip.order+1
        def before_step(self): seen.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())
    learn = synth()
    learn.fit(1, cbs=[GradientClip(.01),Norm])
    assert len(seen) == 8 and all(s <= .0101 for s in seen)

def test_training_is_reproducible():
    "fastai's tests rest on it"
    a,b = synth(),synth()
    a.fit_one_cycle(2); b.fit_one_cycle(2)
    for k,v in state(a.model).items(): assert torch.equal(v, state(b.model)[k]), k
