"""Interpretation on learners of every kind: it changes nothing, also where something fails,
and its figures are labelled"""
import random
import numpy as np,pytest,torch
import matplotlib.pyplot as plt
from torch import nn
from fastai_runbn.all import RunBNCallback,RunBNInterpretation,RunBNRecorder,to_runbn
from fastai_runbn.peers import use_norm
from fastai_runbn.moments import AdaptiveWindow,lesson10_weight
from learners import assert_same,fit,make,running,trained_stats

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def everything(model):
    named = *model.named_parameters(),*model.named_buffers()
    return {n:t.detach().clone() for n,t in named}
def modes(model): return [m.training for m in model.modules()]
def n_hooks(model): return sum(len(m._forward_hooks) for m in model.modules())
def fitted(kind, n=1):
    learn = make(kind, [RunBNCallback(),RunBNRecorder(every=2)], bs=4)
    fit(learn, n)
    return learn

@pytest.mark.parametrize('kind', ['plain','vision','unet','tabular'])
def test_nothing_moves(kind):
    learn = fitted(kind)
    learn.model.train()
    interp = RunBNInterpretation.from_learner(learn)
    def state():
        model = learn.model
        return everything(model),modes(model),n_hooks(model)
    def numbers():
        of_torch = torch.get_rng_state().tolist()
        return random.getstate(),str(np.random.get_state()),of_torch
    (before,*rest),drawn = state(),numbers()
    df,gap = interp.table(),interp.gap(n_batches=3)
    interp.suggestions()
    interp.plot_gap(n_batches=2)
    interp.plot_window(n_batches=3)
    interp.plot_layers()
    interp.compare({'a':learn}, n_batches=2)
    after,*rest_after = state()
    assert_same(before, after)
    assert (rest,drawn) == (rest_after,numbers())
    assert len(df)==len(gap)==len(running(learn))
    assert gap.notna().all(axis=None)
    assert all(m.path is not None for m in running(learn))

def test_a_graph_in_a_hook_is_no_obstacle():
    """A U-Net's hooks hold activations with a graph after a training step,
    and deepcopy of the model would fail"""
    learn = make('unet', RunBNCallback(), bs=2)
    fit(learn)
    learn.model.train()(next(iter(learn.dls.train))[0])
    interp = RunBNInterpretation.from_learner(learn)
    assert len(interp.gap(n_batches=2))==len(running(learn))

@pytest.mark.parametrize('method', ['gap','plot_window'])
def test_an_error_in_the_model_leaves_it_as_it_was(method):
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(5,3,1))
    net = to_runbn(net).train()
    before = everything(net)
    x = torch.randn(4,3,5,5)
    with pytest.raises(RuntimeError):
        getattr(RunBNInterpretation(net, [x], bs=2), method)()
    assert_same(before, everything(net))
    assert all(modes(net)) and n_hooks(net)==0

def test_hooks_of_the_user_stay_and_copies_have_none():
    net,calls = to_runbn(nn.Sequential(nn.BatchNorm2d(3))),[]
    def note(m, inp, out): calls.append(m)
    net[0].register_forward_hook(note)
    x = torch.randn(4,3,5,5)
    RunBNInterpretation(net, [x], bs=2).gap()
    assert n_hooks(net)==1 and set(calls)=={net[0]}

def test_gap_is_the_difference_of_the_outputs():
    net = to_runbn(nn.Sequential(nn.BatchNorm2d(3))).double()
    x = torch.randn(4,3,5,5).double()
    trained_stats(net)
    net[0].seed_window()
    df = RunBNInterpretation(net, [x], bs=4).gap()
    y = net.eval()(x)
    d = net.train()(x)-y
    away = y-y.mean((0,2,3), keepdim=True)
    share = d.square().sum()/away.square().sum()
    want = share.sqrt().item()
    alone,together = df.loc['0'].tolist()
    assert [alone,together] == pytest.approx([want,want], rel=1e-4)

def test_inplace_activations():
    "An activation in place after the norm does not reach what was noted of its output"
    def net(inplace):
        layers = nn.BatchNorm2d(3),nn.ReLU(inplace=inplace),nn.BatchNorm2d(3)
        return to_runbn(nn.Sequential(*layers))
    nets = [net(i) for i in (False,True)]
    for n in nets:
        trained_stats(n)
        for m in (n[0],n[2]): m.seed_window()
    grey = torch.arange(4)[:,None,None,None]
    def gap(net):
        x = torch.ones(4,3,5,5)+grey
        return RunBNInterpretation(net, [x], bs=2).gap()
    a,b = [gap(n) for n in nets]
    assert a.equals(b)

def test_batchnorm_with_one_value_says_what_to_do():
    net = nn.Sequential(nn.Flatten(),
        nn.Linear(12,4), nn.BatchNorm1d(4))
    x = torch.randn(4,3,2,2)
    said = '`2`, a BatchNorm1d, cannot train on one value per channel'
    with pytest.raises(ValueError, match=said):
        RunBNInterpretation.compare({'bn':net}, dl=[x], bs=1)

def test_without_data_or_norms():
    with pytest.raises(ValueError, match='has no running norm'):
        RunBNInterpretation(nn.Linear(2,2))
    interp = RunBNInterpretation(to_runbn(nn.Sequential(nn.BatchNorm1d(3))))
    assert interp.table().rho.tolist()==[1.]
    with pytest.raises(ValueError, match='give `dl`'): interp.gap()
    x = torch.randn(4,2)
    with pytest.raises(ValueError, match='neither running norms nor BatchNorm'):
        net = nn.Linear(2,2)
        interp.compare({'x':net}, dl=[x], bs=2)
    with pytest.raises(ValueError, match='one to 6 learners'): interp.compare({})

def test_table_of_a_loaded_checkpoint():
    net = to_runbn(nn.Sequential(nn.BatchNorm1d(3)))
    loaded = {'0.num_batches_tracked':torch.tensor(50),
        '0.running_mean':torch.ones(3)}
    net.load_state_dict({**net.state_dict(), **loaded})
    rho = RunBNInterpretation(net, bs=2).table().rho
    assert rho.isna().all() # of a window of unknown size

def rho_of(net):
    "As the table has it, of a net that begins with a running norm, its only one"
    return RunBNInterpretation(net, bs=2).table().rho.item()
def share_of_last(net, x, old):
    "The one that `x` has got in the window, whose means were `old`"
    moved = net[0].window_mean-old
    return moved/(x.mean((0,2))-old)

def test_rho_is_what_the_next_batch_gets():
    cases = (20,False),(lesson10_weight,False),(20,True)
    for window,trained in cases:
        net = nn.Sequential(nn.BatchNorm1d(3)).double()
        if trained: net[0].running_mean.fill_(1) # without `num_batches_tracked`
        to_runbn(net, window=window)
        if trained: net(torch.randn(2,3,4).double())
        for t in range(12):
            rho,old = rho_of(net),net[0].window_mean.clone()
            x = torch.randn(2,3,4).double()
            net(x)
            got = share_of_last(net, x, old).tolist()
            assert got == pytest.approx([rho]*3, rel=2e-3), t

def test_rho_of_an_adaptive_window_is_that_of_its_median_channel():
    net = nn.Sequential(nn.BatchNorm1d(5))
    net = to_runbn(net, window=AdaptiveWindow(50)).double()
    drift = torch.tensor([0,0,.1,.5,1]).view(1,5,1)
    for t in range(300):
        rho = rho_of(net) if t%20<2 else None
        x = torch.randn(2,5,4).double()+drift*t
        old = net[0].window_mean.clone()
        net(x)
        got = share_of_last(net, x, old)
        if rho:
            assert got.median().item()==pytest.approx(rho, rel=1e-6), t
    assert got[3:].min()>3*got[0]   # what moves has a shorter window

def test_rho_of_an_adaptive_window_from_a_file():
    "Which does not say how many values the last batch had"
    def net():
        kw = dict(window=AdaptiveWindow(50), persistent_window=True)
        return to_runbn(nn.Sequential(nn.BatchNorm1d(3)), **kw).double()
    trained,loaded = net(),net()
    for t in range(200): # windows are short
        trained(torch.randn(2,3,4).double()+t)
    loaded.load_state_dict(trained.state_dict())
    rho,old = rho_of(loaded),loaded[0].window_mean.clone()
    x = torch.randn(2,3,4).double()+200
    loaded(x)
    got = share_of_last(loaded, x, old)
    assert rho==pytest.approx(got.median().item(), rel=1e-2)

def test_wrapped_models():
    net = to_runbn(nn.Sequential(nn.BatchNorm2d(3)))
    compiled = torch.compile(net, backend='eager')
    for wrapped in (compiled,nn.DataParallel(net)):
        assert list(RunBNInterpretation(wrapped).norms)==['0']

def test_recorder_counts_floor_hits_and_goes_on():
    callbacks = [RunBNCallback(clamp=[1e6]*8),RunBNRecorder(every=3)]
    learn = make('plain', callbacks, bs=4)
    fit(learn, pct=.02) # 7 batches
    rec = learn.run_bn_recorder
    norms = RunBNInterpretation(learn.model).norms
    twice = {n:2*m.num_features for n,m in norms.items()} # 8 samples
    floored = {n:int(h) for n,h in rec.floored.items()}
    assert floored==twice
    assert rec.looked==twice
    batches = rec.batches
    learn.validate()
    assert rec.batches==batches
    fit(learn, pct=.02)
    assert rec.batches==2*batches
    steps = [s for s,_ in rec.history['2']]
    assert steps==list(range(1,2*batches+1,3))
    told = RunBNInterpretation.from_learner(learn).suggestions()[0]
    assert "variance at the floor: in the first samples `2`" in told
    rec.reset()
    assert rec.batches==0 and not rec.history

def inside(label, fig):
    box,extent = fig.bbox.padded(1),label.get_window_extent()
    return box.contains(*extent.min) and box.contains(*extent.max)

def test_figures_are_labelled():
    learn = fitted('vision')
    interp = RunBNInterpretation.from_learner(learn)
    for plot in (interp.plot_gap,interp.plot_window,interp.plot_layers):
        plot()
        fig = plt.gcf()
        fig.canvas.draw()
        axs = fig.axes
        assert all(ax.get_title() for ax in axs[:1])
        assert axs[-1].get_xlabel() and axs[0].get_ylabel()
        assert fig.legends or all(ax.get_legend() for ax in axs)
        for ax in axs:
            for label in (ax.xaxis.label,ax.yaxis.label,ax.title):
                assert inside(label, fig), label
            boxes = [t.get_window_extent() for t in ax.get_xticklabels()
                if t.get_text()]
            neighbours = zip(boxes, boxes[1:])
            assert not any(a.overlaps(b) for a,b in neighbours), plot

def tiled(make=None):
    "Two convolutions and a norm between: a position sees two to each side"
    torch.manual_seed(0)
    def conv(c, nf): return nn.Conv3d(c,nf,3,padding=1)
    net = nn.Sequential(conv(1, 4), nn.BatchNorm3d(4),
        nn.ReLU(), conv(4, 3))
    if make: net = make(net)
    for _ in range(20):
        x = torch.randn(2,1,8,12,12)
        net(x+torch.arange(12))
    return net

def test_tiles_of_volumes():
    """Equal to the bit beyond what padding reaches where the norm does not look at the tile;
    in two axes, the first has one tile"""
    def group_norm(net): return use_norm(net, lambda C: nn.GroupNorm(2, C))
    nets = dict(bn=tiled(), ours=tiled(to_runbn), gn=tiled(group_norm))
    def image():
        return torch.randn(1,1,8,24,24)+torch.arange(24)
    images = [(image(),)*2 for _ in range(3)]
    def mismatch(margin):
        return RunBNInterpretation.tile_mismatch(nets, (8,16,12), images, margin)
    beyond,whole = mismatch(2),mismatch(0)
    assert beyond.bn==beyond.ours==0 and beyond.gn>.01
    assert (whole>.001).all()
    before = {n:everything(m) for n,m in nets.items()}
    apart = RunBNInterpretation.disparity(nets, images, bs=1)
    assert apart.bn>.001 and apart.ours>0 and apart.gn==0
    for n,m in nets.items(): assert_same(everything(m), before[n])
    RunBNInterpretation.plot_tiles(nets, (8,16,12), images, label=2)
    axes = plt.gcf().axes
    assert len(axes)==12 and axes[0].get_ylabel()=='bn'
