"The quality study: every contender in every regime, two processes, and a file that is gone on with"
import json,math,subprocess,sys
from pathlib import Path
import numpy as np
import pytest,torch
from PIL import Image
from torch import nn
from fastai.basics import Learner
from fastai_runbn.bench import quality
from fastai_runbn.bench.families import families
from fastai_runbn.bench.tasks import Detector,roads_dls,volumes_dls
from fastai_runbn.bench.quality import (EmptyWindows,LabelDice,best_rate,due,load_quality,
    make_learner,regimes,trial)
from fastai_runbn.layers import LESSON10,RunningBatchNorm2d,RunningBatchNormMixin
import pandas as pd

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Ten classes of noise about a colour of their own, as a folder"
    d = tmp_path_factory.mktemp('photos')
    rng = np.random.RandomState(0)
    for split,n in (('train',8),('valid',2)):
        for cls in range(10):
            folder = d/split/f'c{cls}'
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.rand(32,32,3)*120+12*cls
                Image.fromarray(pixels.astype(np.uint8)).save(folder/f'{i}.png')
    return d

def went_well(row):
    assert row['note']=='' and 0<=row['score']<=1

@pytest.mark.parametrize('regime,norm',
    [(r,n) for r in ('R2','R4')
        for n in (*regimes[r].norms,*regimes[r].variants)])
def test_every_contender_trains(regime, norm, photos):
    lr = regimes[regime].rates[0]
    row = trial(regime, norm, bs=2, lr=lr, seed=0,
        data=photos, epochs=1)
    went_well(row)
    assert row['seconds']>0
    assert all(0<=o<=1 for o in row['curve'])
    epochs = 3 if regime=='R4' else 1     # two of the head before
    assert len(row['curve'])==epochs
    json.dumps(row, allow_nan=False)

def test_accumulation_steps_every_32_images(photos):
    learn = make_learner('R3', 'ours', 2, 0, photos)
    steps = []
    with learn.no_bar(),learn.no_logging():
        learn.create_opt()
        step = learn.opt.step
        def counted(*args, **kw):
            steps.append(1)
            return step(*args, **kw)
        learn.opt.step = counted
        learn.fit(1, 1e-3)
    assert len(steps)==2                                     # of 80 images

def test_dense_prediction():
    row = trial('R5', 'GroupNorm', bs=16,
        lr=1e-3, seed=0, epochs=1)
    assert row['note']=='' and 0<row['score']<1

def test_the_swap_of_a_trained_model_changes_nothing(photos):
    "R4 begins with the same loss for BatchNorm and for ours"
    losses = []
    for norm in ('BatchNorm','ours','BatchNorm, frozen'):
        learn = make_learner('R4', norm, 2, 0, photos)
        with learn.no_bar(): losses.append(learn.validate()[0])
    assert losses[0]==losses[1]==losses[2]
    assert any(isinstance(m, nn.BatchNorm2d) for m in learn.model.modules())

@pytest.mark.parametrize('norm,affine,stats',
    [('BatchNorm',True,True), ('BatchNorm, frozen',False,False),
    ('BatchNorm, frozen statistics',True,False)])
def test_frozen_norms_stay_what_they_were(photos, norm, affine, stats):
    "In both phases of fine_tune; what is not frozen does not stay"
    learn = make_learner('R4', norm, 2, 0, photos, epochs=1)
    before = {k:v.clone()
        for k,v in learn.model.state_dict().items()}
    with learn.no_bar(),learn.no_logging():
        regimes['R4'].train(learn, 1, 1e-3)
    moved = {k for k,v in learn.model.state_dict().items()
        if not torch.equal(v, before[k])}
    names = [n for n,m in learn.model.named_modules()
        if isinstance(m, nn.BatchNorm2d)]
    for n in names:
        assert (f'{n}.bias' in moved,f'{n}.running_mean' in moved)==(affine,stats)
    assert len(names)==10 and '0.0.0.weight' in moved

def test_the_same_start_for_all_norms():
    def weight(norm, seed):
        return make_learner('R1', norm, 2, seed).model[0].weight
    weights = [weight(n, 1) for n in ('BatchNorm','GroupNorm','ours','MABN')]
    assert all(torch.equal(w, weights[0]) for w in weights)
    assert not torch.equal(weight('ours', 2), weights[0])

def test_norms_are_what_they_are_called(photos):
    def kinds(norm):
        learn = make_learner('R2', norm, 2, 0, photos)
        with learn.no_bar(): learn.validate()
        return learn, {type(m).__name__ for m in learn.model.modules()}
    has = {'GroupNorm':'GroupNorm', 'GroupNorm + WS':'StdConv2d',
        'BatchRenorm':'BatchRenorm2d', 'MABN':'CenConv2d',
        'ours':'RunningBatchNorm2d', 'lesson 10':'RunningBatchNorm2d'}
    for norm,there in has.items():
        learn,names = kinds(norm)
        assert there in names and ('BatchNorm2d' not in names)
    norm = next(m for m in learn.model.modules()
        if isinstance(m, RunningBatchNormMixin))
    settings = norm.settings()
    assert {k:settings[k] for k in LESSON10}==LESSON10
    _,names = kinds('MABN, not centred')
    assert 'CenConv2d' not in names and 'MABN2d' in names
    learn,_ = kinds('BatchNorm, momentum .01')
    momenta = {m.momentum for m in learn.model.modules()
        if isinstance(m, nn.BatchNorm2d)}
    assert momenta=={.01}

def test_a_divergence_is_a_row(monkeypatch):
    def losses(learn, bs): return float('nan'),1.
    monkeypatch.setattr(quality, '_losses', losses)
    row = trial('R1 digits', 'GroupNorm', bs=32,
        lr=.1, seed=0, epochs=1)
    assert row['note']=='diverged' and row['gap'] is None
    json.dumps(row, allow_nan=False)

def test_two_processes_and_going_on(tmp_path):
    script = tmp_path/'s.py'
    script.write_text('import sys\nfrom fastai_runbn.bench.quality import bench_quality\n'
        'if __name__=="__main__": bench_quality(sys.argv[1], ["R1 digits"], seeds=2, '
        'norms="^GroupNorm$", sizes=(32,), epochs=1, jobs=2, '
        'report=lambda row, left: print(row["lr"], row["seed"], left))\n')
    path = tmp_path/'x.jsonl'
    def run():
        done = subprocess.run([sys.executable, script, path],
            capture_output=True, text=True, check=True)
        return done.stdout.split('\n')[:-1]
    first = run()
    df = load_quality(path)
    assert len(first)==len(df)==4
    first_seed = df[df.seed==0]
    assert sorted(first_seed.lr)==[.03,.1,.4]
    assert df[df.seed==1].lr.tolist()==[best_rate(first_seed)]
    assert run()==[]
    lines = path.read_text().splitlines()
    path.write_text('\n'.join(lines[:-1])+'\n')
    assert len(run())==1
    again = load_quality(path).drop(columns='seconds')
    assert again.equals(df.drop(columns='seconds'))

def test_due_waits_for_the_first_seed():
    names,norms = ['R1'],'^ours$'
    nothing = load_quality('nowhere')
    all_first = due(nothing, names, 3, norms)
    bs = regimes['R1'].sizes
    assert len(all_first)==9+3*(len(bs)-1)
    sizes = regimes['R2'].sizes
    assert len(due(nothing, ['R2'], 3, norms))==3*len(sizes)
    of_size = [t for t in all_first if t['bs']==bs[1]]
    done = [dict(t, score=1.) for t in of_size[:2]]
    two = pd.DataFrame(done)
    further = [t for t in due(two, names, 3, norms) if t['seed']]
    assert not [t for t in further if t['bs']==bs[1]]

def test_variants_are_for_the_first_batch_size():
    r = regimes['R2']
    todo = due(load_quality('nowhere'), ['R2'], 1)
    variants = [t for t in todo if t['norm'] in r.variants]
    assert {t['bs'] for t in variants}=={r.sizes[0]}
    assert {t['norm'] for t in todo}=={*r.norms,*r.variants}
    settings = len(r.norms)*len(r.sizes)+len(r.variants)
    assert len(todo)==3*settings

def _after_a_step(norm, lr=.1):
    "Learner of a variant after an epoch of four images, and its norms"
    learn = make_learner('R1 digits', norm, 2, 0, epochs=1)
    learn.dls.train.get_idxs = lambda: [*range(4)]
    with learn.no_bar(),learn.no_logging():
        learn.fit(1, lr)
    norms = [m for m in learn.model.modules()
        if isinstance(m, RunningBatchNorm2d)]
    return learn,norms

def test_windows_empty_at_first_only():
    learn,norms = _after_a_step('ours, windows empty at first')
    cb = next(cb for cb in learn.cbs if isinstance(cb, EmptyWindows))
    assert all((n.window_count>0).all() for n in norms)
    cb.before_train()
    assert all((n.window_count>0).all() for n in norms)
    cb.begun = False
    cb.before_train()
    assert all((n.window_count==0).all() for n in norms)

def near(a, b): return torch.allclose(a, b, atol=1e-6)

def _filter_means(norm):
    "Means of the filters of the first and of the second convolution: drawn, and after a step"
    drawn = make_learner('R1 digits', norm, 2, 0, epochs=1).model
    after = _after_a_step(norm)[0].model
    def means(net):
        filters = [net[i].weight.detach() for i in (0,3)]
        return [f.mean([1,2,3]) for f in filters]
    return means(drawn),means(after)

@pytest.mark.parametrize('norm', ['GroupNorm','BatchRenorm','MABN','BatchNorm'])
def test_means_are_kept_under_any_norm_as_under_ours(norm):
    even,odd = slice(0, None, 2),slice(1, None, 2)
    def like_ours(*means):
        "Those of every second filter as drawn, those of the others 0"
        kept = all(near(a[odd], b[odd])
            for a,b in zip(means, drawn))
        return kept and all(a[even].abs().max()<1e-6 for a in means)
    drawn,after = _filter_means(f'{norm}, means kept')
    assert like_ours(*after) and like_ours(*_filter_means('ours')[1])
    drawn,after = _filter_means('ours, means not kept')
    assert not near(drawn[1], after[1])

def test_filters_of_the_variants():
    drawn,after = _filter_means('ours, filters as drawn')
    assert all(near(a, b) for a,b in zip(drawn, after))
    learn,_ = _after_a_step('ours, filters at zero')
    convs = {type(m).__name__ for m in learn.model.modules()
        if isinstance(m, nn.Conv2d)}
    assert convs=={'CenConv2d'}

@pytest.mark.parametrize('regime,norm',
    [('H1','MABN'),('H2','GroupNorm + WS'),('H2','ours'),
    ('H3','BatchRenorm'),('H3','MABN'),('H3','ours'),
    ('H3','InstanceNorm, means kept'),('H4','ours'),
    ('H5','MABN, means kept')])
def test_other_nets_train(regime, norm, photos):
    learn = make_learner(regime, norm, 2, 0, photos, epochs=1)
    learn.dls.train.part = 4
    learn.dls.train.get_idxs = lambda: [*range(4)]
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(),learn.no_logging():
        learn.fit(1, 1e-3)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    pairs = zip(before, learn.model.parameters())
    assert any(not torch.equal(a, b) for a,b in pairs)

def test_further_seeds_are_for_those_near_the_best():
    norms = ('ours','GroupNorm','BatchNorm')
    todo = due(load_quality('nowhere'), ['R2'], 3, sizes=(1,))
    def rows(scores):
        def score(t): return scores.get(t['norm'], .1)-t['lr']
        return pd.DataFrame([dict(t, score=score(t)) for t in todo])
    def further(scores, near=.05):
        trials = due(rows(scores), ['R2'], 3,
            sizes=(1,), near=near)
        return {(t['norm'],t['lr'],t['seed']) for t in trials}
    low = min(regimes['R2'].rates)
    scores = {'ours':.5,'GroupNorm':.46,'BatchNorm':.4}
    def both_seeds(norms):
        return {(n,low,s) for n in norms for s in (1,2)}
    assert further(scores)==both_seeds(norms[:2])
    assert further(scores, .2)==both_seeds(norms)
    partly = rows({'ours':.5})
    untried = partly[partly.norm!='MABN']      # one norm, of those asked for
    def seeds(norms):
        trials = due(untried, ['R2'], 3, norms, sizes=(1,))
        return {t['seed'] for t in trials}
    assert not any(seeds(''))
    assert seeds('^ours$')=={1,2}

@pytest.fixture
def scans(tmp_path):
    "Four volumes, all the same, of two cubes"
    x = np.zeros((16,16,16), np.uint8)
    x[4:8,4:8,4:8] = 100
    x[8:12,4:8,4:8] = 200
    path = tmp_path/'scans.npz'
    parts = dict(image=x, label=x//100)
    arrays = {f'{k}_{i}':v for i in range(4)
        for k,v in parts.items()}
    np.savez(path, **arrays)
    return path

class SeesOneLabel(nn.Module):
    "Finds the first label, and background in the place of the second"
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))       # fastai asks it for its device
    def forward(self, x):
        lowest = x.min()
        grey = (x[:,0]-lowest)/(x.max()-lowest)
        label = (2*grey).round().long()%2
        return nn.functional.one_hot(label, 3).movedim(-1, 1).float()

def small_volumes(bs, data):
    return volumes_dls(data, bs, (16,16,16), 2, 2, device='cpu')

def test_the_dice_coefficient_of_the_labels_only(scans):
    dls = small_volumes(1, scans)
    learn = Learner(dls, SeesOneLabel(), metrics=LabelDice())
    with learn.no_bar(): dice = learn.validate()[1]
    assert dice==pytest.approx(.5)           # 1 and 0

@pytest.mark.parametrize('regime,norm',
    [('V1','ours'),('V1','InstanceNorm'),('V1','BatchNorm'),
    ('V1 MONAI','ours'),('V1 MONAI','MABN')])
def test_volumes_train(scans, regime, norm, monkeypatch):
    monkeypatch.setattr(regimes[regime], 'loaders', small_volumes)
    row = trial(regime, norm, bs=1, lr=1e-3, seed=0,
        data=scans, epochs=2)
    went_well(row)
    assert len(row['curve'])==2

@pytest.mark.parametrize('norm', regimes['V2'].norms)
def test_roads_train(tmp_path, norm, monkeypatch):
    "A road below a sky, one image at a time"
    for split in ('train','val'):
        for kind in ('images','labels'):
            (tmp_path/split/kind).mkdir(parents=True)
        for i in range(2):
            column = np.repeat(np.array([0,3], np.uint8), 32)
            label = column[:,None].repeat(64, 1)
            image = Image.fromarray(label*60+i).convert('RGB')
            image.save(tmp_path/split/'images'/f'{i}.png')
            Image.fromarray(label).save(tmp_path/split/'labels'/f'{i}.png')
    def small(bs, data):
        return roads_dls(data, bs, (64,64), device='cpu')
    monkeypatch.setattr(regimes['V2'], 'loaders', small)
    row = trial('V2', norm, bs=1, lr=3e-4, seed=0,
        data=tmp_path, epochs=1)
    went_well(row)

def test_the_study_is_imported_without_what_few_regimes_need():
    "`runbn bench quality --quick` after `pip install .`"
    code = '''import sys
for name in ('torchmetrics','pycocotools','monai','mlxtend','timm'): sys.modules[name] = None
from fastai_runbn.bench.quality import trial
print(trial('R1 digits', 'ours', 32, .03, 0, epochs=1)['score'])'''
    p = subprocess.run([sys.executable,'-W','ignore','-c',code],
        capture_output=True, text=True)
    assert not p.returncode, p.stderr[-2000:]
    assert float(p.stdout)>.5

root = Path(__file__).resolve().parent.parent
def test_a_detector_finds_the_same_where_gradients_are_kept():
    torch.manual_seed(0)
    net,x = Detector().eval(),torch.rand(2,3,96,128)
    out = net(x, None)
    with torch.no_grad(): same = net(x, None)
    assert out.shape==(2,10,6) and out.requires_grad
    assert torch.equal(out, same)

def test_a_model_without_batchnorm_has_no_norms_on_small_maps():
    assert quality._on_small_maps(nn.Conv2d(3,4,3))==[]

tasks_of_readme = {"brain MRI, MONAI's 3-d U-Net, Dice":'V1 MONAI',
    'brain MRI, plain 3-d U-Net, Dice':'V1', 'boxes, Faster R-CNN, mAP':'V3',
    "road scenes, fastai's U-Net, IoU":'V2', 'photographs, small ResNet, accuracy':'R2',
    'fine-tuning it':'R4', 'clothes, MobileNetV3':'H2'}
norms_of_readme = {'ours':'this layer', 'BatchNorm':'BatchNorm',
    **dict.fromkeys(('GroupNorm','GroupNorm, means kept','GroupNorm + WS'), 'GroupNorm'),
    'MABN':'MABN', 'MABN, means kept':'MABN', 'InstanceNorm':'InstanceNorm',
    'BatchRenorm':'BatchRenorm', 'BatchNorm, frozen':'frozen BatchNorm'}

def test_the_table_of_readme_is_the_studys():
    def shown(v): return f'{v:.3f}'.removeprefix('0')
    text = (root/'README.md').read_text()
    start = text.index('||batch|this layer|')
    head,_,*lines = text[start:].split('\n\n')[0].splitlines()
    assert head=='||batch|this layer|BatchNorm|GroupNorm|best other|'
    rows = [line.replace('**', '')[1:-1].split('|') for line in lines]
    assert [r[0] for r in rows]==[*tasks_of_readme]
    study = quality.load_quality(root/'nbs'/'quality.jsonl')
    for what,bs,*told in rows:
        regime = tasks_of_readme[what]
        columns = {n:(n,int(bs)) for n in norms_of_readme}
        means = quality.means_table(study, [regime], columns).loc[regime].dropna()
        best = means.groupby(norms_of_readme).max()
        named = [shown(best[n]) if n in best else ''
            for n in ('this layer','BatchNorm','GroupNorm')]
        others = best.drop(['this layer','BatchNorm','GroupNorm'], errors='ignore')
        assert told==[*named, f'{shown(others.max())} {others.idxmax()}'], what

def test_the_tiles_of_readme_are_the_pages():
    "Its saved table has the mismatch in the second column"
    page = json.loads((root/'nbs'/'tutorials'/'volumes.ipynb').read_text())
    cell, = [c for c in page['cells'] if 'look.tile_mismatch' in ''.join(c['source'])]
    lines = cell['outputs'][-1]['data']['text/plain'][1:]
    rows = {name:float(margin) for name,_,margin,*_ in map(str.split, lines)}
    instance,ours = [f'{rows[n]:.3f}'.removeprefix('0') for n in ('InstanceNorm','ours')]
    said = f'two tilings differ by {instance} with instance norm, {ours} here'
    assert said in (root/'README.md').read_text()

def test_readme_counts_the_models():
    "All families but two without BatchNorm, and one that is made here"
    none = 'timm convnext_atto','timm vit_tiny_patch16_224','fused Conv+BN'
    models = [n for n in families if n not in none]
    assert {n.split()[0] for n in models}=={'timm','torchvision','fastai','smp','monai'}
    assert f'|{len(models)} models of timm,' in (root/'README.md').read_text()
