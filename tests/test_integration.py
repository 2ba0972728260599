"The 25 points of fitting into fastai and PyTorch, each a test with its number"
import math,os,pickle,subprocess,sys,warnings
from copy import deepcopy
import pytest,torch
from fastai.callback.all import (ActivationStats,BnFreeze,Callback,CancelFitException,ChannelsLast,
    CutMix,EarlyStoppingCallback,GradientAccumulation,GradientClip,MixUp,ReduceLROnPlateau,
    SaveModelCallback,SchedCos,SchedExp,SchedLin,TerminateOnNaNCallback)
from fastai.learner import SkipToEpoch
from fastai.vision.all import (Adam,Learner,OptimWrapper,SGD,
    accuracy,load_learner,ranger,set_seed)
from fastai.vision.gan import GANLearner,basic_critic,basic_generator
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torchvision.ops import FrozenBatchNorm2d
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint_sequential
from fastai_runbn.all import RunBNCallback,RunBNSchedule,surgery_report,to_bn,to_runbn
from fastai_runbn.layers import RunningBatchNormMixin,runbn_settings
from fastai_runbn.bench.families import families,there_and_back,trains
from fastai_runbn.bench.tasks import digits_dls
from learners import assert_same,fit,five,make,norms,running,short,state,trained_stats

two = pytest.mark.parametrize('kind', ['plain','vision'])
three = pytest.mark.parametrize('kind', ['plain','timm','tabular'])
every = pytest.mark.parametrize('kind', ['plain','vision','timm','unet','tabular'])
def preds(learn): return learn.get_preds(inner=False)[0]
def converted(learn): return len(running(learn)) == len(norms(learn))
def finite(learn):
    return all(t.isfinite().all() for t in state(learn.model).values())
def hush(learn):
    "Have it show nothing"
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None

# surgery

@three
def test_01_identities_are_kept(kind):
    learn = make(kind)
    hooked,seen = norms(learn)[0],[]
    def note(m, inp, out): seen.append(type(m).__name__)
    hooked.register_forward_hook(note)
    def lists(): return learn.model.parameters,learn.model.modules
    parts = [list(f()) for f in lists()]
    buffers = dict(learn.model.named_buffers())
    learn.add_cb(RunBNCallback())
    fit(learn)
    for f,old in zip(lists(), parts):
        assert [id(o) for o in f()] == [id(o) for o in old]
    now = dict(learn.model.named_buffers())
    assert all(now[k] is v for k,v in buffers.items())
    assert seen and all('Running' in s for s in seen)

@three
def test_02_there_and_back_is_bit_equal(kind):
    learn = make(kind)
    trained_stats(learn.model)
    norms(learn)[0].requires_grad_(False).momentum = .033
    norms(learn)[1].eval()
    def look(m):
        trained = [p.requires_grad for p in m.parameters()]
        dtypes = [b.dtype for b in m.buffers()]
        settings = m.momentum,m.eps,m.affine,m.training
        return type(m),settings,trained,dtypes,sorted(vars(m))
    def looks(): return [look(m) for m in norms(learn)]
    before,sd = looks(),five(learn.model)
    to_runbn(learn.model)
    assert converted(learn)
    to_bn(learn.model)
    assert looks() == before
    assert_same(five(learn.model), sd)

def test_03_odd_layers_are_handled_or_reported():
    shared = nn.BatchNorm2d(4)
    handled = nn.ModuleDict(dict(
        shared=shared, alias=shared,
        plain=nn.BatchNorm2d(4, affine=False),
        cumulative=nn.BatchNorm2d(4, momentum=None),
        sync=nn.SyncBatchNorm(4),
        one=nn.BatchNorm1d(4), three=nn.BatchNorm3d(4)))
    if 'bias' in nn.BatchNorm2d.__init__.__code__.co_varnames:
        handled['nobias'] = nn.BatchNorm2d(4, bias=False)
    parametrized = register_parametrization(nn.BatchNorm2d(4), 'weight', nn.Identity())
    own_class = type('MyNorm', (nn.BatchNorm2d,), {})
    reported = nn.ModuleDict(dict(
        notrack=nn.BatchNorm2d(4, track_running_stats=False),
        lazy=nn.LazyBatchNorm2d(), frozen=FrozenBatchNorm2d(4),
        parametrized=parametrized, sub=own_class(4)))
    model = nn.ModuleList([handled,reported])
    classes = [type(m) for m in reported.values()]
    with pytest.warns(UserWarning, match='lazy norms are left alone'): to_runbn(model)
    report = surgery_report(model)
    names = {f'0.{k}' for k in handled if k!='alias'}
    assert {r.name for r in report.running} == names
    assert handled['alias'] is shared
    names = {f'1.{k}' for k in reported}
    assert {r.name for r in report.left_alone} == names
    assert [type(m) for m in reported.values()] == classes
    reasons = dict(notrack='keeps no statistics', lazy='not materialised',
        frozen="not PyTorch's", parametrized='parametrized', sub='register_norm')
    for name,why in reasons.items():
        row = next(r for r in report.rows if r.name==f'1.{name}')
        assert why in row.why
    images = 2,4,3,3
    shapes = dict(plain=images, cumulative=images, sync=images,
        one=(2,4), three=(2,4,3,3,3))
    for k,shape in shapes.items():
        y = handled[k](torch.randn(shape))
        assert y.isfinite().all()
    # the model is a norm itself
    assert type(to_bn(to_runbn(nn.BatchNorm2d(3)))) is nn.BatchNorm2d
    assert to_bn(model)[0]['cumulative'].momentum is None
    assert type(handled['sync']) is nn.SyncBatchNorm

@pytest.mark.parametrize('name', families)
def test_04_families_there_and_back(name):
    without = name.endswith(('convnext_atto','vit_tiny_patch16_224'))
    row = None if without else there_and_back(name)
    if row is None: # no batch norm at all: a warning, and the model as it was
        model,_ = families[name]()
        with pytest.warns(UserWarning, match='Nothing to convert.*LayerNorm'): to_runbn(model)
    else:
        assert row['bit_equal'] and row['converted'] == row['norms'] > 2
        model,x = families[name]()
        assert trains(to_runbn(model), x)

@two
def test_05_hooks_fire_and_activation_stats_are_whole(kind):
    learn = make(kind, RunBNCallback())
    fit(learn, pct=.02)
    stats = ActivationStats(modules=running(learn))
    fit(learn, cbs=[stats])
    assert len(stats.stats) > 0
    assert len(stats.stats[0]) == len(running(learn))
    entries = [s for step in stats.stats for s in step]
    assert not any(s is None or math.isnan(s['mean']) for s in entries)
    # in the fit that converts: hooks go on the converted layers
    fresh = make(kind, RunBNCallback())
    stats = ActivationStats(modules=norms(fresh))
    fit(fresh, cbs=[stats])
    assert len(stats.stats[0]) == len(running(fresh))
    entries = [s for step in stats.stats for s in step]
    assert not any(s is None for s in entries)

# the optimizer

def adamw(ps, **kw): return OptimWrapper(ps, torch.optim.AdamW, **kw)
@pytest.mark.parametrize('opt',
    [Adam, ranger, SGD, adamw],
    ids=['Adam','ranger','SGD','AdamW'])
@pytest.mark.parametrize('kind', ['plain','timm'])
def test_06_gamma_and_beta_move_in_the_first_and_second_fit(kind, opt):
    learn = make(kind, RunBNCallback(), opt_func=opt)
    for _ in range(2):
        before = state(learn.model)
        fit(learn, lr=1e-2, pct=.1)
        stepped = {id(p) for p in learn.opt.all_params().itemgot(0)}
        assert {id(p) for p in learn.model.parameters()} == stepped
        moved = {n for n,p in learn.model.named_parameters()
            if not torch.equal(p, before[n])}
        names = [n for n,m in learn.model.named_modules()
            if isinstance(m, RunningBatchNormMixin)]
        ours = {f'{n}.{k}' for n in names for k in ('weight','bias')}
        assert ours <= moved
        # timm's cut-off head has two parameters that nothing uses
        buffers = dict(learn.model.named_buffers())
        assert len(moved) >= len(before)-len(buffers)-2

@pytest.mark.parametrize('kind', ['vision','timm'])
def test_07_do_wd_and_force_train_are_batch_norms(kind, tmp_path):
    def flags(l):
        return [(tuple(p.shape), s.get('do_wd'), s.get('force_train'))
            for p,_,s,_ in l.opt.all_params()]
    bn,run = make(kind),make(kind, RunBNCallback())
    to_runbn(run.model)
    def both(f):
        f(bn)
        f(run)
        assert flags(bn) == flags(run)
    both(lambda l: l.create_opt())
    both(lambda l: l.freeze())
    assert any(f for *_,f in flags(run)) # norms of the frozen body are trained
    both(lambda l: fit(l))
    both(lambda l: l.unfreeze())
    both(lambda l: l.fine_tune(1, 1e-3, freeze_epochs=1, cbs=short(.02)))
    both(lambda l: l.fit(1, 1e-3, reset_opt=True, cbs=short(.02)))
    run.path = tmp_path
    run.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    again.create_opt()
    assert flags(again) == flags(run)

@pytest.mark.parametrize('kind', ['vision','timm'])
def test_08_gamma_is_not_decayed_frozen_norms_train_and_bnfreeze_holds(kind):
    learn = make(kind, RunBNCallback(), wd=.5, opt_func=SGD)
    learn.freeze()
    learn('before_fit')
    body,first = running(learn)[0],learn.model[0]
    def conv(): return next(p for p in first.parameters() if p.ndim==4)
    gamma = body.weight.detach().clone()
    conv_was = conv().detach().clone()
    for p in learn.model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for _ in range(3): learn.opt.step()
    # no gradient, and weight decay leaves it alone
    assert torch.equal(body.weight, gamma)
    fit(learn, lr=.01)
    assert not torch.equal(body.weight, gamma)
    assert torch.equal(conv(), conv_was)
    still = make(kind, RunBNCallback(), train_bn=False)
    still.freeze()
    fit(still)
    body = [m for m in still.model[0].modules()
        if isinstance(m, RunningBatchNormMixin)]
    stats = [(m.running_mean.clone(),m.window_mean.clone())
        for m in body]
    fit(still, cbs=[BnFreeze()])
    assert body
    for m,(mean,window) in zip(body, stats):
        assert torch.equal(m.running_mean, mean)
        assert torch.equal(m.window_mean, window)
    fit(still)
    for m,(_,window) in zip(body, stats):
        assert not torch.equal(m.window_mean, window)

# a learner's life

class Stop(Callback):
    "Interrupts a fit, as a user's Ctrl-C does"
    def after_batch(self):
        if self.training and self.train_iter==2: raise KeyboardInterrupt

@two
def test_09_fits_interrupts_and_callbacks_that_come_and_go(kind):
    learn = make(kind, RunBNCallback())
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[Stop()])
    assert converted(learn)
    n = len(running(learn))
    fit(learn)
    fit(learn)
    def steps(): return running(learn)[0].num_batches_tracked.item()
    before = steps()
    learn.remove_cb(learn.run_bn)
    assert not hasattr(learn, 'run_bn')
    fit(learn) # stays converted without it
    assert len(running(learn)) == n and steps() > before
    learn.add_cb(RunBNCallback(running_grad=1.))
    fit(learn)
    assert all(m.running_grad==1 for m in running(learn))
    learn.add_cb(RunBNCallback(running_grad=0.))
    with pytest.warns(UserWarning, match='RunBNCallback is there twice'):
        fit(learn)
    assert all(m.running_grad==1 for m in running(learn))
    late = make(kind)
    fit(late)
    assert not running(late)
    late.add_cb(RunBNCallback())
    fit(late)
    assert len(running(late)) == n

@every
def test_10_nothing_that_only_looks_changes_anything(kind, capsys):
    bn,run = make(kind),make(kind, RunBNCallback())
    for l in (bn,run): trained_stats(l.model)
    before = five(run.model)
    assert bn.validate() == run.validate()
    assert len(running(run)) == len(norms(run)) > 2
    assert_same(five(run.model), before)
    assert torch.equal(preds(bn), preds(run))
    if kind in ('plain','vision'):
        item = run.dls.valid_ds[0][0]
        x = item[None].to(run.dls.device)
        a,b = (l.model.eval()(x) for l in (bn,run))
        assert torch.equal(a, b)
    if kind=='tabular':
        row = run.dls.raw.iloc[520]
        assert torch.equal(bn.predict(row)[2], run.predict(row)[2])
        bn.show_results()
        run.show_results()
    for l in (bn,run): l.summary()
    window = state(run.model)
    preds(run)
    run.validate()
    assert_same(state(run.model), window)                                # the window too

def test_10_predict_tta_and_show_results_on_images(tmp_path):
    from PIL import Image
    from fastai.vision.all import ImageDataLoaders,Resize,aug_transforms,vision_learner
    from torchvision.models import resnet18
    from sklearn.datasets import load_digits
    import matplotlib.pyplot as plt
    digits = load_digits()
    for i in range(24):
        folder = tmp_path/str(digits.target[i]%2)
        folder.mkdir(exist_ok=True)
        pixels = (digits.images[i]*15).astype('uint8')
        Image.fromarray(pixels).resize((32,32)).save(folder/f'{i}.png')
    outs = []
    for cbs in (None,RunBNCallback()):
        set_seed(1)
        dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.5, seed=1, bs=4,
            num_workers=0, batch_tfms=aug_transforms(do_flip=False), item_tfms=Resize(32))
        learn = vision_learner(dls, resnet18, pretrained=False, normalize=False,
            cbs=cbs, metrics=accuracy)
        hush(learn)
        trained_stats(learn.model)
        before = five(learn.model)
        set_seed(2)
        tta = learn.tta(n=2)[0]
        image = next(iter(tmp_path.glob('0/*.png')))
        outs.append((learn.predict(image)[2], tta))
        learn.show_results(max_n=2)
        plt.close('all')
        assert_same(five(learn.model), before)
    assert running(learn)
    assert all(torch.equal(a, b) for a,b in zip(*outs))

class ValidateInside(Callback):
    "Looks at the state before and after each validation in a fit"
    times = 0
    def before_validate(self): self.before = state(self.learn.model)
    def after_validate(self):
        assert_same(state(self.learn.model), self.before)
        self.times += 1

@every
def test_11_validation_in_training_moves_nothing(kind):
    learn,look = make(kind, RunBNCallback()),ValidateInside()
    fit(learn, n=2, cbs=[look])
    assert look.times == 2

# checkpoints

@three
def test_12_strict_loads_between_learners(kind, tmp_path):
    run,bn,other = (make(kind, cb, path=tmp_path)
        for cb in (RunBNCallback(),None,RunBNCallback()))
    def save(with_opt):
        run.save('r', with_opt=with_opt)
        bn.save('b', with_opt=with_opt)
    fit(run)
    fit(bn)
    other.validate()
    for with_opt in (True,False):
        save(with_opt)
        for src,dst,f in ((run,bn,'r'),(bn,run,'b'),(run,other,'r')):
            save(with_opt)
            dst.load(f, with_opt=with_opt, strict=True)
            assert_same(five(dst.model), five(src.model))
            assert dst.validate() == src.validate()
        fit(run)
        fit(bn)
    sd = torch.load(tmp_path/'models'/'r.pth', weights_only=True)
    assert set(five(bn.model)) == set(sd.get('model', sd))

@two
@pytest.mark.parametrize('end_lr', [1e-2,1e6], ids=['calm','diverging'])
def test_13_lr_find_first_restores_everything(kind, end_lr, tmp_path):
    learn = make(kind, RunBNCallback(), path=tmp_path)
    def find():
        learn.lr_find(end_lr=end_lr, num_it=20,
            show_plot=False, suggest_funcs=())
    sd = five(learn.model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        find()
    assert_same(five(learn.model), sd)
    for m in running(learn): m.refresh_window() # as the next training forward does
    assert running(learn)
    for m in running(learn):
        assert (m.window_count==0).all() and m.samples_seen.item()==0
        assert (m.window_grad==0).all()
    fit(learn)
    assert all(b.isfinite().all() for b in learn.model.buffers())
    sd = five(learn.model)
    find()
    assert_same(five(learn.model), sd)

@three
def test_14_save_model_callback(kind, tmp_path):
    learn = make(kind, RunBNCallback(), path=tmp_path, bs=256)
    learn.fit(3, 1e-2, cbs=SaveModelCallback(fname='best'))
    assert converted(learn)
    assert (tmp_path/'models'/'best.pth').exists()
    best = torch.load(tmp_path/'models'/'best.pth', weights_only=True)
    assert_same(five(learn.model), best.get('model', best))
    least = min(v[1] for v in learn.recorder.values)
    assert learn.validate()[0] == pytest.approx(least, rel=1e-3)
    fit(learn)

@three
def test_15_copies_pickles_and_exports_after_training(kind, tmp_path):
    learn = make(kind, RunBNCallback(), path=tmp_path)
    fit(learn)
    assert not any(b.requires_grad for b in learn.model.buffers())
    copies = deepcopy(learn.model),pickle.loads(pickle.dumps(learn.model))
    for copied in copies:
        assert_same(state(copied), state(learn.model))
    size = len(pickle.dumps(learn.model.state_dict()))
    want = preds(learn)
    learn.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    got = again.get_preds(dl=learn.dls.valid, inner=False)[0]
    assert torch.equal(got, want)
    assert len(running(again)) == len(norms(learn))
    fit(learn)
    assert len(pickle.dumps(learn.model.state_dict())) == size

def test_16_pretrained_statistics_without_a_count_are_kept():
    for kind in ('plain','vision'):
        learn = make(kind)
        trained_stats(learn.model)
        for m in norms(learn): m.num_batches_tracked.zero_()
        sd = five(learn.model)
        learn.add_cb(RunBNCallback())
        learn.validate()
        for m in running(learn):
            assert (m.window_count==-1).all()
            assert torch.equal(m.window_mean, m.running_mean)
        assert_same(five(learn.model), sd)
        fit(learn, lr=0., pct=.03)
        means = [v for k,v in sd.items() if k.endswith('running_mean')]
        for m,old in zip(running(learn), means):
            std = m.running_var.max().sqrt()
            most = (old.abs().max()+std)*2
            assert (m.running_mean-old).abs().max() < most

# together with

class BF16(Callback):
    "bfloat16 autocast on a CPU; fastai's MixedPrecision knows CUDA only"
    order,run_valid = 10,False
    def before_batch(self):
        self.ctx = torch.autocast('cpu', torch.bfloat16)
        self.ctx.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.ctx.__exit__(None, None, None)

together = dict(
    accumulation=lambda: [GradientAccumulation(64)],
    clip=lambda: [GradientClip(.1)],
    mixup=lambda: [MixUp()], cutmix=lambda: [CutMix()],
    early=lambda: [EarlyStoppingCallback(patience=1)],
    skip=lambda: [SkipToEpoch(1)],
    nan=lambda: [TerminateOnNaNCallback()],
    channels_last=lambda: [ChannelsLast()],
    plateau=lambda: [ReduceLROnPlateau(patience=1)])

@two
@pytest.mark.parametrize('name', together)
def test_17_together_with(kind, name):
    learn = make(kind, RunBNCallback())
    gamma = norms(learn)[0].weight.detach().clone()
    fit(learn, n=2, cbs=together[name](), pct=.1)
    assert converted(learn) and finite(learn)
    assert not torch.equal(running(learn)[0].weight, gamma)

def test_17_terminate_on_nan_ends_and_the_window_is_well():
    learn = make('plain', RunBNCallback())
    class Bad(Callback):
        def before_batch(self):
            if not (self.training and self.train_iter==4): return
            self.learn.xb = (self.xb[0]*float('nan'),)
    fit(learn, cbs=[Bad(),TerminateOnNaNCallback()], pct=.5)
    assert running(learn)[0].num_batches_tracked.item() < 10
    for m in running(learn):
        assert m.window_mean.isfinite().all()
        assert m.running_var.isfinite().all()
    assert learn.run_bn.report.rows[0].skipped == 1

def test_17_gan():
    set_seed(0)
    from fastai.basics import DataLoaders,default_device
    class Pairs(torch.utils.data.Dataset):
        x = next(iter(digits_dls(64, size=16).train))[0].cpu()
        def __len__(self): return len(self.x)
        def __getitem__(self, i): return torch.randn(8),self.x[i]
    dls = DataLoaders.from_dsets(Pairs(), Pairs(), bs=8, device=default_device())
    size = dict(n_channels=1, n_features=8, n_extra_layers=1)
    generator = basic_generator(16, in_sz=8, **size)
    critic = basic_critic(16, act_cls=lambda: nn.LeakyReLU(.2), **size)
    learn = GANLearner.wgan(dls, generator, critic, cbs=RunBNCallback())
    hush(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1, 2e-4, wd=0)
    assert len(running(learn)) == len(norms(learn)) > 2
    assert finite(learn)
    assert running(learn)[0].num_batches_tracked.item() > 0

@pytest.mark.parametrize('kind', ['timm','unet','tabular'])
def test_17_fine_tune_one_cycle_and_more_learners(kind):
    learn = make(kind, RunBNCallback())
    first = learn.validate()[0]
    if kind=='timm': learn.fine_tune(1, 2e-3, cbs=short(.3))
    else: learn.fit_one_cycle(2, 1e-3 if kind=='unet' else 1e-2)
    assert converted(learn)
    assert learn.recorder.losses[-1] < learn.recorder.losses[3]
    # timm's random weights take longer, with batch norm too (3.1 after two epochs)
    if kind!='timm': assert learn.validate()[0] < first

def test_17_text_without_batch_norm_warns_and_goes_on():
    from fastai.text.all import AWD_LSTM,get_language_model
    from fastai.basics import DataLoaders,default_device
    from torch.utils.data import TensorDataset
    set_seed(0)
    ids = torch.randint(0, 20, (32,9))
    tokens = TensorDataset(ids[:,:-1], ids[:,1:])
    dls = DataLoaders.from_dsets(tokens, tokens, bs=8, device=default_device())
    config = dict(emb_sz=8, n_hid=8, n_layers=2, pad_token=1,
        output_p=.1, hidden_p=.1, input_p=.1, embed_p=.1, weight_p=.1,
        tie_weights=True, out_bias=True)
    model = get_language_model(AWD_LSTM, 20, config=config)
    def loss(out, y):
        return nn.functional.cross_entropy(out[0].flatten(0,1), y.flatten())
    learn = Learner(dls, model, loss_func=loss, cbs=RunBNCallback())
    hush(learn)
    with pytest.warns(UserWarning, match='Nothing to convert.*0 running norms'):
        learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(1)

@two
def test_18_bf16_autocast(kind):
    learn = make(kind, RunBNCallback())
    fit(learn, n=2, cbs=[BF16()], pct=.02)
    for m in running(learn):
        dtypes = {b.dtype for b in m.buffers() if b.is_floating_point()}
        assert dtypes == {torch.float32}
        assert all(b.isfinite().all() for b in m.buffers())
        assert m.num_batches_tracked.item() > 3

@two
def test_19_batch_size_1_last_partial_batches_and_two_forwards(kind):
    bs = 1 if kind=='plain' else 7 # 1,440 = 205·7 + 5
    learn = make(kind, RunBNCallback(), bs=bs)
    fit(learn, pct=.01)
    learn.dls.train.drop_last = False
    m = learn.model.train()
    size = 32 if kind=='vision' else 28
    xs = [torch.randn(n,1,size,size, requires_grad=True)
        for n in (1,3)]
    ys = [m(x) for x in xs]
    for y in ys: y.sum().backward()
    assert all(x.grad.isfinite().all() for x in xs)
    def block(c, act):
        return nn.Conv2d(c,4,3),nn.BatchNorm2d(4),act(inplace=True)
    layers = *block(1, nn.ReLU),*block(4, nn.LeakyReLU)
    net = to_runbn(nn.Sequential(*layers))
    net(torch.randn(2,1,8,8)).sum().backward()

ddp = '''
import os,sys,torch,torch.distributed as dist
from torch import nn
from datetime import timedelta
sys.path.insert(0, sys.argv[3])
from fastai_runbn.surgery import to_bn,to_runbn
from fastai_runbn.bench.families import families
from fastai_runbn.bench.tasks import lesson10_convnet
rank,store,root,broadcast,kind = int(sys.argv[1]),*sys.argv[2:]
kw = dict(broadcast_buffers=False) if broadcast=='False' else {}
dist.init_process_group('gloo', init_method=f'file://{store}',
    rank=rank, world_size=2, timeout=timedelta(seconds=60))
torch.manual_seed(0)
if kind=='plain': model,x = lesson10_convnet(),torch.randn(2,1,28,28)
else: model,x = families['timm lcnet_035']()
model = to_runbn(model)
net = nn.parallel.DistributedDataParallel(model, **kw)
try: to_runbn(net)
except TypeError as e: assert 'Convert before wrapping' in str(e)
else: raise SystemExit('a wrapped model was converted')
opt = torch.optim.SGD(net.parameters(), .1)
torch.manual_seed(rank)
for _ in range(10):
    opt.zero_grad()
    y = net(torch.randn(2,*x.shape[1:]))
    nn.functional.cross_entropy(y, torch.randint(2, (2,))).backward()
    opt.step()
for p in model.parameters():
    both = [torch.zeros_like(p) for _ in range(2)]
    dist.all_gather(both, p.detach())
    assert torch.equal(*both) and p.isfinite().all()
first = next(m for m in model.modules() if hasattr(m, 'window_mean'))
assert first.num_batches_tracked.item()==10
assert all(b.isfinite().all() for b in model.buffers())
# its reducer holds the group, which otherwise is torn down
# in the middle of the exit (2 aborts in 40 runs)
del net
dist.barrier()
dist.destroy_process_group()
print('trained')
'''

@pytest.mark.parametrize('broadcast', [True,False])
@pytest.mark.parametrize('kind', ['plain','timm'])
def test_20_ddp_of_two_processes(kind, broadcast, tmp_path):
    """A converted model trains under DDP: the ranks' parameters stay equal
    (the windows are each rank's own, or rank 0's with broadcast_buffers)"""
    (tmp_path/'ddp.py').write_text(ddp)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    def start(rank):
        args = [tmp_path/'ddp.py',rank,tmp_path/'store',root,broadcast,kind]
        return subprocess.Popen([sys.executable,*map(str, args)], env=env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ps = [start(r) for r in range(2)]
    try: outs = [p.communicate(timeout=120)[0] for p in ps]
    finally:
        for p in ps: p.kill()
    assert [p.returncode for p in ps] == [0,0], outs
    assert all('trained' in o for o in outs), outs

@pytest.mark.parametrize('kind', ['plain','tabular'])
def test_21_compiled_is_eager(kind):
    "`learn.model.compile()` before the fit; the callback converts inside, and the keys stay"
    losses = []
    for compiled in (False,True):
        torch._dynamo.reset()
        learn = make(kind, RunBNCallback())
        keys = list(learn.model.state_dict())
        if compiled: learn.model.compile(backend='aot_eager')
        fit(learn, lr=.05, pct=.2)
        assert converted(learn)
        assert list(learn.model.state_dict()) == keys
        of_fit = [torch.as_tensor(l) for l in learn.recorder.losses]
        losses.append(torch.stack(of_fit))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize('kind', ['timm','vision'])
def test_22_checkpointed_gradients_are_plain(kind):
    import timm
    for reentrant in (True,False):
        torch.manual_seed(0)
        if kind=='timm': a = timm.create_model('resnet18', pretrained=False, num_classes=10)
        else: a = make('vision').model.eval()
        a = to_runbn(a).double()
        b = deepcopy(a)
        for m in (a,b): m.train()
        for m in (*a.modules(),*b.modules()):
            if isinstance(m, nn.Dropout): m.p = 0.
        if kind=='timm':
            b.set_grad_checkpointing(True)
            timm.layers.set_reentrant_ckpt(reentrant)
            f = b
        else:
            def f(x):
                body = checkpoint_sequential(b[0], 2, x, use_reentrant=reentrant)
                return b[1](body)
        channels,y = 3 if kind=='timm' else 1,torch.tensor([0,2])
        for _ in range(2):
            x = torch.randn(2,channels,32,32).double().requires_grad_()
            for net in (a,f):
                nn.functional.cross_entropy(net(x), y).backward()
        tols = dict(rtol=1e-8, atol=1e-10)
        for (k,p),q in zip(a.named_parameters(), b.parameters()):
            torch.testing.assert_close(q.grad, p.grad, msg=k, **tols)
        for (k,p),q in zip(a.named_buffers(), b.buffers()):
            torch.testing.assert_close(q, p, msg=k, **tols)

@two
def test_23_update_bn(kind):
    learn = make(kind, RunBNCallback())
    fit(learn)
    settings = [m.settings() for m in running(learn)]
    xs = [b[0] for b in learn.dls.valid]
    x,parts = xs[0],xs[0].split(32)
    update_bn(list(parts), learn.model)
    assert [m.settings() for m in running(learn)] == settings
    first = running(learn)[0]
    assert first.num_batches_tracked.item() == len(parts)
    h = []
    def note(m, inp): h.append(inp[0].detach())
    hook = first.register_forward_pre_hook(note)
    with torch.no_grad(): learn.model.eval()(x)
    hook.remove()
    # each batch counts the same, the smaller last one too, as in BatchNorm
    means = [o.mean((0,2,3)) for o in h[0].split(32)]
    batches = torch.stack(means)
    torch.testing.assert_close(first.running_mean, batches.mean(0), rtol=1e-3, atol=1e-4)

# schedules and looks

@two
def test_24_schedules_are_recorded_drawn_and_undone(kind, tmp_path):
    import matplotlib.pyplot as plt
    learn = make(kind, RunBNCallback(), path=tmp_path)
    def sched():
        return RunBNSchedule(window=SchedCos(20,100),
            running_grad=SchedLin(0,1), floor=SchedExp(.1,.001))
    names = ['runbn_window','runbn_running_grad','runbn_floor']
    learn.fit_one_cycle(2, 1e-3, cbs=[sched(),short(.05)])
    hps = learn.recorder.hps
    assert list(hps) == ['lr','mom',*names]
    assert len({len(v) for v in hps.values()}) == 1
    assert hps['runbn_window'][0] == pytest.approx(20)
    assert hps['runbn_running_grad'] == sorted(hps['runbn_running_grad'])
    learn.recorder.plot_sched()
    labels = [a.get_ylabel() for a in plt.gcf().axes]
    assert labels[2:5] == names
    plt.close('all')
    want = runbn_settings()
    def as_made(m):
        if torch.is_tensor(m.running_grad): return False
        return m.settings()==want and m.clamp_floor.shape==(21,)
    def restored(): return all(as_made(m) for m in running(learn))
    assert restored()
    fit(learn, cbs=[sched()]) # a fit without a ParamScheduler
    assert set(learn.recorder.hps) == {*names} and restored()
    learn.add_cb(sched())
    learn.lr_find(num_it=10, show_plot=False, suggest_funcs=())
    assert restored()
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[Stop()])
    assert not restored()
    learn.validate()
    assert restored()
    class Cancel(Callback):
        def after_batch(self): raise CancelFitException
    fit(learn, cbs=[Cancel()])
    assert restored()
    there = hasattr(learn, 'run_bn_schedule')
    learn.remove_cb(learn.run_bn_schedule if there else RunBNSchedule)
    with pytest.raises(KeyboardInterrupt):
        fit(learn, cbs=[sched(),Stop()])
    assert not restored()
    fit(learn) # RunBNCallback undoes it where the schedule is gone
    assert restored()

def test_24_a_schedule_of_the_window_goes_before_the_accumulated_window():
    learn = make('plain', RunBNCallback())
    def cbs():
        return GradientAccumulation(64),RunBNSchedule(window=SchedCos(20,100))
    fit(learn, n=3, cbs=cbs(), pct=.1)
    hps = learn.recorder.hps['runbn_window']
    assert hps[0] == pytest.approx(20)
    assert hps == sorted(hps) and hps[-1] > 70
    seen = []
    class Look(Callback):
        def after_batch(self):
            if not self.training: return
            seen.append(torch.is_tensor(running(self)[0].window))
    fit(learn, n=3, cbs=[*cbs(),Look()], pct=.1)
    assert len(seen) > 6 and all(seen)

@two
def test_25_run_bn_no_shadowing_and_light_imports(kind):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        callbacks = [RunBNCallback(),RunBNSchedule(running_grad=SchedLin(0,1))]
        learn = make(kind, callbacks)
        fit(learn)
    assert isinstance(learn.run_bn, RunBNCallback)
    assert not [w for w in caught if 'shadow' in str(w.message).lower()]
    code = '''import sys,fastai.basics
import fastai_runbn.all
print([m for m in ('timm','accelerate','onnx','hypothesis') if m in sys.modules])'''
    done = subprocess.run([sys.executable,'-W','ignore','-c',code],
        capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'

quiet = dict(logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False)

@pytest.mark.parametrize('package', ['pytorch_lightning',None])
def test_lightning_by_its_other_package_and_by_none(package):
    "In a process where `lightning` cannot be imported, and one where neither can"
    code = f"""import sys
sys.modules['lightning'] = None
if not {package!r}: sys.modules['pytorch_lightning'] = None
from fastai_runbn.lightning import RunBNLightning
import pytorch_lightning as pl, torch
from torch import nn
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.Flatten())
    def training_step(self, b, i): return self.net(b).square().mean()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .01)
it = Module()
loader = torch.utils.data.DataLoader(torch.randn(6,1,8,8), batch_size=2)
trainer = pl.Trainer(max_epochs=1, accelerator='cpu', callbacks=RunBNLightning(), **{quiet})
trainer.fit(it, loader)
print(type(it.net[1]).__name__, it.net[1].num_batches_tracked.item())"""
    p = subprocess.run([sys.executable,'-W','ignore','-c',code],
        capture_output=True, text=True)
    if package: assert p.stdout.split('\n')[-2]=='RunningBatchNorm2d 3', p.stderr[-2000:]
    else: assert "pip install 'fastai_runbn[lightning]'" in p.stderr and p.returncode

def test_lightning_hears_how_many_samples_a_batch_has():
    "Rows are points, three a cloud; after the fit the layers count by themselves again"
    import lightning as L
    from fastai_runbn.lightning import RunBNLightning
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.norm,self.seen = nn.BatchNorm1d(4),[]
        def training_step(self, b, i):
            loss = self.norm(b.view(-1, 4)).square().mean()
            self.seen.append(self.norm.batch_size)
            return loss
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .01)
    it = Module()
    loader = torch.utils.data.DataLoader(torch.randn(6,3,4), batch_size=2)
    trainer = L.Trainer(max_epochs=1, accelerator='cpu',
        callbacks=RunBNLightning(), **quiet)
    trainer.fit(it, loader)
    assert it.seen==[2,2,2] and it.norm.batch_size is None
    assert it.norm.samples_seen.item()==6
