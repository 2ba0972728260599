"The callback with real Learners on digits: trains, changes nothing before it, and goes back"
import warnings
import pytest,torch
from torch import nn
from torchvision.models import resnet18
from fastai.vision.all import Adam,Callback,GradientAccumulation,Learner,SGD,ShortEpochCallback,accuracy,set_seed,vision_learner
from fastai_runbn.all import LESSON10,RunBNCallback,RunningBatchNorm2d,surgery_report,to_bn,to_runbn
from fastai_runbn.layers import RunningBatchNormMixin,runbn_settings
from fastai_runbn.bench.tasks import digits_dls,lesson10_convnet
from fastai_runbn.filters import FilterMeans
from fastai_runbn.cli import train_digits

def plain_learner(cbs=None, bs=32): return Learner(digits_dls(bs), lesson10_convnet(), metrics=accuracy, opt_func=SGD, lr=.1, cbs=cbs)
def vision(cbs=None, bs=16):
    return vision_learner(digits_dls(bs, size=32), resnet18, n_in=1, n_out=10, pretrained=False, normalize=False, metrics=accuracy, lr=3e-3, cbs=cbs)
makers = dict(plain=plain_learner, vision=vision)

@pytest.fixture(params=makers)
def make(request):
    "Makes a seeded learner that shows nothing"
    def _make(cbs=None):
        set_seed(3)
        learn = makers[request.param](cbs)
        learn.remove_cb(learn.progress)
        learn.logger = lambda *args: None
        return learn
    return _make

def trained_stats(model):
    "Statistics as after some training, so that nothing is at its initial value"
    g = torch.Generator().manual_seed(5)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(generator=g); m.running_var.uniform_(.5, 2, generator=g); m.num_batches_tracked.fill_(100)

def test_runbn_is_far_ahead_of_batchnorm_at_bs_2():
    bn,run = train_digits(bs=2, epochs=1, bar=False),train_digits(RunBNCallback(), bs=2, epochs=1, bar=False)
    assert run.recorder.values[-1][2] > .85
    assert run.recorder.values[-1][2] > bn.recorder.values[-1][2]+.2

def test_learners_train(make):
    learn = make(RunBNCallback())
    first = learn.validate()[0]
    before = {n:p.detach().clone() for n,p in learn.model.named_parameters()}
    learn.fit_one_cycle(1)
    loss,acc = learn.validate()
    assert loss < first and acc > .5
    norms = {n for n,m in learn.model.named_modules() if isinstance(m, RunningBatchNormMixin)}
    assert len(norms) == len(learn.run_bn.report.running) > 4 and not learn.run_bn.report.convertible
    for n,p in learn.model.named_parameters():
        assert not torch.equal(p, before[n]), f'{n} did not move'

def test_validate_before_any_fit_is_bit_equal(make):
    bn,run = make(),make(RunBNCallback())
    for l in (bn,run): trained_stats(l.model)
    keys = list(run.model.state_dict())
    assert bn.validate() == run.validate()
    torch.testing.assert_close(run.get_preds()[0], bn.get_preds()[0], rtol=0, atol=0)
    assert run.run_bn.report.running
    assert list(run.model.state_dict()) == keys
    for (k,a),b in zip(run.model.state_dict().items(), bn.model.state_dict().values()): assert torch.equal(a, b), k

def test_to_bn_gives_back_types_and_identical_outputs(make):
    learn = make(RunBNCallback())
    types = [type(m) for m in learn.model.modules()]
    learn.fit(1, 1e-3, cbs=ShortEpochCallback(.1))
    assert [type(m) for m in learn.model.modules()] != types
    preds = learn.get_preds()[0]
    assert learn.to_bn() is learn and not hasattr(learn, 'run_bn')
    assert torch.equal(learn.get_preds()[0], preds)
    assert [type(m) for m in learn.model.modules()] == types

def test_parameters_stay_the_optimizers(make):
    learn = make(RunBNCallback())
    params = {id(p) for p in learn.model.parameters()}
    for _ in range(2): learn.fit(1, 1e-3, cbs=ShortEpochCallback(.05))
    assert {id(p) for p in learn.model.parameters()} == params == {id(p) for p in learn.opt.all_params().itemgot(0)}

def test_second_fit_keeps_the_window(make):
    learn = make(RunBNCallback())
    learn.fit(1, 1e-3, cbs=ShortEpochCallback(.1))
    norms = [m for m in learn.model.modules() if isinstance(m, RunningBatchNormMixin)]
    state = [m.window_mean.clone() for m in norms]
    learn.validate()
    learn('before_fit')
    assert all(torch.equal(m.window_mean, s) for m,s in zip(norms, state))

def test_lr_find_restores_and_the_fit_after_it_works(make):
    learn = make(RunBNCallback())
    sd = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.lr_find(num_it=12, show_plot=False, suggest_funcs=())
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, sd[k]), k
    norms = [m for m in learn.model.modules() if isinstance(m, RunningBatchNormMixin)]
    for m in norms: m.refresh_window()                                        # as the next training forward does
    assert norms and all((m.window_count==0).all() for m in norms)             # as fresh as before
    learn.fit(1, 1e-3, cbs=ShortEpochCallback(.05))

def test_shared_and_root_layers():
    bn = nn.BatchNorm2d(4)
    net = to_runbn(nn.Sequential(bn, nn.ReLU(), bn))
    assert net[0] is net[2] is bn and type(bn) is RunningBatchNorm2d
    assert [r.name for r in surgery_report(net).rows] == ['0']
    assert type(to_bn(to_runbn(nn.BatchNorm2d(4)))) is nn.BatchNorm2d

def test_lesson10_settings_reach_the_layers():
    learn = train_digits(RunBNCallback(**LESSON10), bs=32, epochs=1, bar=False)
    assert all(m.settings()==runbn_settings(**LESSON10) for m in learn.model.modules() if isinstance(m, RunningBatchNormMixin))

def means(learn):
    return {n:p.detach().mean([1,2,3]) for n,p in learn.model.named_parameters() if p.ndim==4}

def test_filters_keep_their_means_from_fit_to_fit(make):
    "With another optimizer, accumulated gradients, frozen groups and a learning rate search before; and in the fits after the first"
    learn = make(RunBNCallback())
    learn.opt_func = Adam
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.lr_find(num_it=5, show_plot=False, suggest_funcs=())
    drawn = means(learn)
    for mean in drawn.values(): mean[::2] = 0
    class GradientMeans(Callback):
        order,seen = 90,0. # after clipping
        def before_step(self): self.seen = max(self.seen, *(w.grad.mean([1,2,3]).abs().max().item()/w.grad.std().item() for w,*_ in self.run_bn.means.filters.values()))
    for cbs in ([],[GradientAccumulation(32)]):
        grads = GradientMeans()
        learn.fit(1, 1e-3, cbs=[*cbs,ShortEpochCallback(.1),grads])
        assert 0<grads.seen<1e-6
        assert list(learn.run_bn.means.filters) == list(drawn)
        for n,mean in means(learn).items():
            torch.testing.assert_close(mean, drawn[n], rtol=0, atol=1e-6)
    learn.freeze()
    learn.fit(1, 1e-3, cbs=ShortEpochCallback(.05))
    filters = learn.run_bn.means.filters
    assert all(w.requires_grad for w,*_ in filters.values()) and (len(learn.opt.param_lists)==1 or not filters)

def test_filters_of_trained_models_keep_their_means(make):
    learn = make(RunBNCallback())
    trained_stats(learn.model)
    def filters(): return {n:p.detach().clone() for n,p in learn.model.named_parameters() if p.ndim==4}
    before = filters()
    learn.opt_func = Adam
    learn.fit(1, 1e-3, cbs=ShortEpochCallback(.05))
    after,held = filters(),learn.run_bn.means.filters
    assert held and before.keys()==held.keys()
    for n in held:
        assert not torch.equal(after[n], before[n])
        torch.testing.assert_close(after[n].mean([1,2,3]), before[n].mean([1,2,3]), rtol=0, atol=1e-7)
        assert before[n].mean([1,2,3]).abs().max()>1e-4

def test_means_of_filters_are_taken_where_the_model_trains(make):
    "After callbacks have moved it: fastai puts it on its device in `before_fit`, later than the callback converts"
    class Move(Callback):
        order = -10
        def before_fit(self): self.model.double()
        def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)
    learn = make([RunBNCallback(),Move()])
    trained_stats(learn.model)
    learn.fit(1, 1e-3, cbs=ShortEpochCallback(.05))
    held = learn.run_bn.means.filters
    assert held and all(mean.dtype is w.dtype is torch.float64 for w,mean,_ in held.values())

@pytest.mark.parametrize('closure', ['none','positional','keyword'])
def test_filters_keep_their_means_on_an_optimizer(closure):
    "As the callback has it, step by step, with Adam, whose steps have means where gradients have none; Lightning calls backward in a closure"
    def net():
        torch.manual_seed(0)
        return to_runbn(nn.Sequential(nn.Conv2d(2,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4,4,3), nn.BatchNorm2d(4)))
    a,b = net(),net()
    opts = [torch.optim.Adam(m.parameters(), .01) for m in (a,b)]
    kept = [b[i].weight.detach().mean([1,2,3], keepdim=True) for i in (0,3)]
    for mean in kept: mean[::2] = 0
    def put_back():
        with torch.no_grad():
            for i,mean in zip((0,3), kept):
                b[i].weight -= b[i].weight.mean([1,2,3], keepdim=True)-mean
    assert isinstance(FilterMeans(a).on(opts[0]), FilterMeans)
    for _ in range(5):
        x = torch.randn(2,2,7,7)
        for m,opt in zip((a,b), opts):
            def backward():
                opt.zero_grad()
                loss = m(x).square().sum()
                loss.backward()
                return loss
            if m is a and closure!='none':
                assert opt.step(*([backward] if closure=='positional' else []), **({} if closure=='positional' else dict(closure=backward)))>0
                continue
            backward()
            if m is b:
                for i in (0,3): b[i].weight.grad -= b[i].weight.grad.mean([1,2,3], keepdim=True)
            opt.step()
        put_back()
        assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
