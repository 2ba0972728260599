"What the benchmark of speed is made of; no speed is asserted"
import json,math,os,subprocess,sys
from itertools import product
from pathlib import Path
import pandas as pd
import pytest,torch
from torch import nn
from fastai_runbn.bench import speed
from fastai_runbn.bench.speed import (bench_layer,bench_layers,bench_model,bench_speed,
    columns,contenders,copy_bandwidth,count_ops,floor_bytes,geomean,group_of,interleave,
    layer_cases,load_speed,model_cases,peak_memory,plot_speed,ratio_table,save_speed,
    speed_cases,spread,summarize,targets)

def rows(*figures, contender='ours', layout='contiguous',
    precision='float32', part='both', **kw):
    "Made-up rows: `figures` are pairs of a shape and a ratio"
    kw = {'threads':2, 'base':'BatchNorm', **kw}
    def row(shape, ratio):
        return dict(shape=shape, ratio=ratio, contender=contender, layout=layout,
            precision=precision, part=part, group=group_of(shape, layout), **kw)
    return pd.DataFrame([row(*f) for f in figures], columns=columns)

def summary(*dfs):
    "Of all these rows, by group and contender"
    df = summarize(pd.concat(dfs, ignore_index=True))
    return df.set_index(['group','contender'])

# groups and figures

big = ('2x64x56x56','2x256x56x56','4x32x128x128',
    '16x64x56x56','32x256x28x28','2x64x224x224')

@pytest.mark.parametrize('layout', ['contiguous','channels_last'])
def test_groups_hold_the_shapes_they_name(layout):
    for s in big: assert group_of(s, layout)==f'{layout}, from 2x64x56x56'
    for s in ('2x64x16x16','2x512x7x7','2x64x56x55'):
        assert group_of(s, layout)=='small maps'
    for s in ('1x32x32x64x64','1x2x2x2x2'):
        assert group_of(s, layout)==f'3-d, {layout}'
    for s in speed.models: assert group_of(s, layout)==s

def test_every_case_of_a_full_run_is_in_a_group_with_a_target():
    layers,models = speed_cases()
    one_thread = 9*2 if torch.get_num_threads()>1 else 0
    assert len(layers)==9*2*2+one_thread
    assert len(models)==3*2
    of_layers = {group_of('x'.join(map(str, s)), l) for s,l,*_ in layers}
    of_models = {group_of(*m) for m in models}
    assert of_layers|of_models==set(targets)

def test_quick_is_a_part_of_the_full_run():
    layers,models = speed_cases(quick=True)
    all_layers,all_models = speed_cases()
    assert 0<len(layers)<=6 and set(layers)<set(all_layers)
    assert len(models)==1 and set(models)<set(all_models)

def test_only_selects_by_name():
    precisions = {p for _,_,p,_ in layer_cases(only='bf16')}
    assert precisions=={'bf16 autocast'}
    shape = 2,64,16,16
    cases = layer_cases(threads=(2,1), only='^2x64x16x16 channels_last float32$')
    assert cases==[(shape,'channels_last','float32',n) for n in (2,1)]
    cases = layer_cases(threads=(3,), only='^2x64x16x16 .* bf16')
    assert cases==[(shape,l,'bf16 autocast',3) for l in speed.layouts]
    models = model_cases(only='U-Net')
    assert models==[('U-Net 256px','contiguous'),('U-Net 256px','channels_last')]

def test_geometric_mean():
    assert geomean([2,8])==pytest.approx(4)
    assert geomean([.25,4])==pytest.approx(1)
    assert geomean([3])==pytest.approx(3)
    assert math.isnan(geomean([]))

def test_spread_takes_ratios_round_by_round():
    ms,base = [10.,1,4,3,2],[10.,1,2,1,1]
    got = spread(pd.Series(ms), pd.Series(base))
    times = [got[k] for k in ('ms','ms_low','ms_high')]
    ratios = [got[k] for k in ('ratio','ratio_low','ratio_high')]
    assert times==[3,2,4]
    assert ratios==[2,1,2]   # of 1 1 2 3 2; of the medians it would be 3

# targets

def test_mean_and_worst_of_a_group():
    df = summary(rows(('2x64x56x56',.4), ('16x64x56x56',.8)))
    got = df.loc['contiguous, from 2x64x56x56','ours']
    assert got['mean']==pytest.approx(math.sqrt(.32))
    assert (got.worst,got.worst_case)==(.8,'16x64x56x56 contiguous')
    assert (got.cases,got.met)==(2,'yes')

@pytest.mark.parametrize('ratio,met', [(.61,'yes'),(.63,'no')])
def test_target_by_the_mean(ratio, met):
    got = summary(rows(('2x64x56x56',ratio)))
    assert got.met['contiguous, from 2x64x56x56','ours']==met

def test_no_shape_far_above():
    figures = ('2x64x56x56',.1),('16x64x56x56',.9)
    got = summary(rows(*figures))
    assert got.met['contiguous, from 2x64x56x56','ours']=='no'
    got = summary(rows(*figures, layout='channels_last'))
    assert got.met['channels_last, from 2x64x56x56','ours']=='yes'

def test_other_rows_do_not_count():
    shape = '2x64x56x56'
    others = [dict(precision='bf16 autocast'), dict(part='forward'),
        dict(contender='MABN'), dict(threads=1)]
    df = [rows((shape,.5)), rows((shape,math.nan)),
        rows(('2x64x16x16',9)), rows(('1x32x32x64x64',9)),
        *[rows((shape,9), **kw) for kw in others]]
    got = summary(*df).loc[f'contiguous, from {shape}','ours']
    assert got['mean']==pytest.approx(.5) and got.cases==1

def test_small_maps_and_models_are_of_both_layouts():
    ratios = ('contiguous',1),('channels_last',4)
    layers = [rows(('2x64x16x16',r), ('1x32x32x64x64',r), layout=l)
        for l,r in ratios]
    models = [rows(('resnet18 128px',r), layout=l, part='step')
        for l,r in ratios]
    got = summary(*layers, *models)
    for g in ('small maps','resnet18 128px'):
        assert got['mean'][g,'ours']==pytest.approx(2)
        assert got.cases[g,'ours']==2
    assert got['mean']['3-d, contiguous','ours']==1
    assert got['mean']['3-d, channels_last','ours']==4

def test_compiled_models_are_in_ratio_to_the_compiled_model():
    got = summary(rows(('resnet18 128px',1.1), part='step',
        contender='ours, model compiled', base='BatchNorm, model compiled'))
    assert got.met['compiled models','ours, model compiled']=='no'
    assert got.met['resnet18 128px','ours']=='not measured'

@pytest.mark.parametrize('ours,met', [(.5,'yes'),(.6,'no')])
def test_times_as_fast_as_lesson_10(ours, met):
    big = '2x64x56x56','1x32x32x64x64'
    def ratios(r, of_small): return *[(s,r) for s in big],('2x64x16x16',of_small)
    of_ours = rows(*ratios(ours, 9))
    of_lesson10 = rows(*ratios(3., 1), contender='lesson 10')
    df = summary(of_ours, of_lesson10)
    got = df.loc["times as fast as lesson 10's layer",'ours']
    assert got['mean']==pytest.approx(3/ours)
    assert got.met==met and got.cases==2

@pytest.mark.parametrize('peak,met', [(1.004,'yes'),(1.01,'no')])
def test_peak_memory(peak, met):
    got = summary(rows(('2x64x56x56',1), peak_ratio=peak),
        rows(('U-Net 256px',1), part='step', peak_ratio=peak),
        rows(('2x64x16x16',1), peak_ratio=5))
    for what in ('layers from 2x64x56x56','whole models'):
        assert got.met[f'peak memory, {what}','ours']==met

def test_nothing_measured():
    got = summarize(pd.DataFrame(columns=columns))
    assert set(got.met)=={'not measured'}
    assert len(got)>=len(targets)+4

# measuring

def test_interleave_runs_all_in_every_round_in_changing_order():
    calls = []
    def called(n): return lambda: calls.append(n)
    fs = {n:called(n) for n in 'abc'}
    times = interleave(fs, rounds=8, sample_ms=0)
    assert times.shape==(8,3)
    assert list(times.columns)==[*'abc']
    starts = range(len(calls)-24, len(calls), 3)
    last = [tuple(calls[i:i+3]) for i in starts]   # a sample is one call here
    assert all(sorted(o)==[*'abc'] for o in last)
    assert len(set(last))>1

def test_a_sample_is_long_enough():
    calls = []
    interleave({'f':lambda: calls.append(1)}, rounds=1, sample_ms=.5)
    assert len(calls)>50

def test_ops_are_those_that_do_work():
    x = torch.randn(2,3,4,4)
    def views():
        flat = x[0].view(-1).detach()
        return flat.unsqueeze(0).expand(4,-1)
    assert count_ops(lambda: None)==0
    assert count_ops(views)==0
    assert count_ops(lambda: torch.empty(3))==0
    assert count_ops(lambda: (x*2).add_(1).sum())==3
    assert count_ops(lambda: x.to(torch.float32))==0
    assert count_ops(lambda: x.to(torch.float64))==1
    layer = nn.GroupNorm(1, 3)
    x2 = torch.randn(2,3,4,4, requires_grad=True)
    def both():
        return torch.autograd.grad(layer(x2), x2, torch.ones_like(x2))
    assert count_ops(both)==3 # and one that makes the ones

def test_peak_is_what_is_held_at_once():
    def megabyte(): return torch.empty(10**6, dtype=torch.uint8)
    def f():
        a,b = megabyte(),megabyte()
        del a
        c = megabyte()
        return b,c
    assert 2e6<=peak_memory(f)<2.01e6

@pytest.mark.parametrize('make,tensors',
    [(lambda: nn.Identity(),0), (lambda: nn.ReLU(),2),
    (lambda: nn.GroupNorm(4, 8),2)])
def test_peak_of_a_layer_is_output_and_gradient(make, tensors):
    layer = make()
    x = torch.randn(2,8,64,64, requires_grad=True)
    dy = torch.ones_like(x)
    def both():
        y = layer(x)
        return y,torch.autograd.grad(y, x, dy)
    assert tensors*x.nbytes<=peak_memory(both)<=(tensors+.02)*x.nbytes

def test_floor_is_eight_passes():
    assert floor_bytes((2,64,56,56))==8*2*64*56*56*4
    assert floor_bytes((2,3), 2)==96
def test_bandwidth_is_positive(): assert copy_bandwidth(mb=4)>1e8

@pytest.fixture(scope='module')
def one():
    "One case, timed"
    return bench_layer((2,16,7,7),
        rounds=3, sample_ms=.1, bandwidth=1e9)

def test_one_case_end_to_end(one):
    assert tuple(one.columns)==columns
    assert set(one.contender)==set(contenders)
    assert set(one.group)=={'small maps'}
    ran = one[one.ms.notna()]
    eager = 'BatchNorm','lesson 10','ours','formulas','GroupNorm','BatchRenorm','MABN'
    for name,part in product(eager, ('forward','backward','both')):
        chosen = (ran.contender==name) & (ran.part==part)
        assert len(ran[chosen])==1
    bn = one[one.contender=='BatchNorm']
    assert (bn[['ratio','ratio_low','ratio_high']]==1).all(axis=None)
    assert bn.peak_ratio.dropna().tolist()==[1]
    both = ran[ran.part=='both'].set_index('contender')
    assert both.ops['BatchNorm']==3
    assert (both.ops>=2).all()
    assert (both.roofline>0).all()
    assert (both.ms_low<=both.ms).all()
    assert (both.ms<=both.ms_high).all()
    least = floor_bytes((2,16,7,7))/1e9*1e3
    assert both.roofline['ours']==pytest.approx(least/both.ms['ours'])

def test_who_cannot_run_says_so(one):
    sync = one[one.contender=='SyncBatchNorm']
    assert sync.note.tolist()==['does not run on the CPU']
    assert sync.ms.isna().all()

@pytest.mark.parametrize('shape', [(2,8,5,5),(1,8,3,4,4)])
@pytest.mark.parametrize('precision', speed.precisions)
def test_layouts_and_precisions_are_those_asked_for(shape, precision, monkeypatch):
    seen = []
    class Spy(nn.BatchNorm2d):
        def _check_input_dim(self, x):
            autocast = torch.is_autocast_enabled('cpu')
            seen.append((x.dtype, x.is_contiguous(), autocast, self.training))
    monkeypatch.setitem(contenders, 'spy', (Spy,Spy))
    short = dict(rounds=1, sample_ms=0)
    for layout in speed.layouts:
        bench_layer(shape, layout, precision, names=['spy'], **short)
    df = bench_layer(shape, threads=1, names=[], **short)
    assert df.threads.unique().tolist()==[1]
    half = precision!='float32'
    dtype = torch.bfloat16 if half else torch.float32
    assert set(seen)=={(dtype,plain,half,True) for plain in (True,False)}

def test_a_failing_contender_is_a_row_and_a_warning_a_note(monkeypatch):
    import warnings
    class Warns(nn.BatchNorm2d):
        path = 'aten'
        def forward(self, x):
            warnings.warn('no compiler here')
            return super().forward(x)
    def fails(C): raise ValueError('no such layer')
    monkeypatch.setitem(contenders, 'fails', (fails,fails))
    monkeypatch.setitem(contenders, 'warns', (Warns,Warns))
    with pytest.warns(UserWarning, match='no compiler'):
        df = bench_layer((2,8,5,5), names=['fails','warns'],
            rounds=1, sample_ms=0)
    both = df[df.part=='both'].set_index('contender')
    assert both.note['fails']=='ValueError: no such layer'
    assert both.note['warns']=='no compiler here'
    assert both.path['warns']=='aten'

def test_report_is_called_for_each_case():
    seen = []
    cases = layer_cases([(2,8,5,5)],
        precisions=('float32',), threads=(1,))
    df = bench_layers(cases, names=['ours'], rounds=1, sample_ms=0,
        report=lambda d: seen.append(d.layout[0]))
    assert seen==['contiguous','channels_last'] and len(df)==2*2*3

def test_one_model_end_to_end(monkeypatch):
    def tiny():
        body = nn.Conv2d(3,4,3),nn.BatchNorm2d(4),nn.ReLU()
        head = nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(4,5)
        return nn.Sequential(*body, *head)
    monkeypatch.setitem(speed.models, 'tiny', (tiny,(2,3,8,8)))
    df = bench_model('tiny', 'channels_last',
        names=['lesson 10','ours'], rounds=2, sample_ms=.1)
    assert df.contender.tolist()==['BatchNorm','lesson 10','ours']
    assert set(df.part)=={'step'}
    assert set(df.group)=={'tiny'}
    assert (df.ms>0).all()
    assert (df.ops>5).all()
    assert df.ratio[0]==1 and df.peak_ratio[0]==1

def test_json_there_and_back(one, tmp_path):
    save_speed(one, tmp_path/'x.json')
    text = (tmp_path/'x.json').read_text()
    json.loads(text, parse_constant=lambda c: pytest.fail(f'{c} is no JSON'))
    back,where = load_speed(tmp_path/'x.json')
    assert where['torch']==torch.__version__
    assert {'cpu','threads','date'}<=set(where)
    assert back.contender.tolist()==one.contender.tolist()
    assert back.note.tolist()==one.note.tolist()
    torch.testing.assert_close(torch.tensor(back.ratio), torch.tensor(one.ratio),
        atol=1e-5, rtol=0, equal_nan=True)
    assert summarize(back).met.tolist()==summarize(one).met.tolist()

def is_png(path): return path.read_bytes()[:4]==b'\x89PNG'

def test_table_and_picture(one, tmp_path):
    table = ratio_table(one)
    both = one[one.part=='both']
    ours = both[both.contender=='ours']
    assert table.index.tolist()==[('2x16x7x7','contiguous')]
    assert table.columns[0]=='BatchNorm, ms'
    assert table['ours'].iloc[0]==ours.ratio.iloc[0]
    assert ratio_table(one, value='ops')['BatchNorm'].iloc[0]==3
    fig = plot_speed(one, tmp_path/'x.png')
    ran = both[both.ms.notna() & (both.contender!='BatchNorm')]
    assert len(fig.axes)==1
    axes = fig.axes[0]
    assert len(axes.containers)//2==len(ran)
    assert axes.get_yscale()=='log'
    assert is_png(tmp_path/'x.png')

def test_names_are_chosen_by_expression():
    df = bench_speed(quick=True, only='2x64x16x16 contiguous', names='^ours|MABN')
    assert set(df.contender)=={'BatchNorm','ours','MABN'}

def test_an_activation_apart_is_computed_by_itself():
    timm = pytest.importorskip('timm')
    net = nn.Sequential(timm.layers.BatchNormAct2d(4))
    model = speed.model_contenders['ours, activation apart'](net)
    assert model[0].act._forward_hooks
    x = torch.randn(2,4,3,3)
    bn = nn.BatchNorm2d(4).eval()
    assert torch.equal(model.eval()(x), torch.relu(bn(x)))

# the command

def runbn(*args, cwd):
    code = 'import sys; from fastai_runbn.cli import main; main(sys.argv[1:])'
    checkout = str(Path(speed.__file__).parents[2])
    return subprocess.run([sys.executable, '-c', code, *args],
        cwd=cwd, env={**os.environ, 'PYTHONPATH':checkout},
        capture_output=True, text=True, timeout=300)

def test_command_writes_figures_and_picture(tmp_path):
    what = '--only','2x64x16x16 contiguous','--contenders','^ours$','--device','cpu'
    files = '--json','x.json','--out','x.png'
    done = runbn('bench', 'speed', '--quick', *what, *files, cwd=tmp_path)
    assert (done.returncode,done.stderr)==(0,''), done.stderr
    assert done.stdout.startswith('2x64x16x16 contiguous float32: BatchNorm')
    assert 'small maps' in done.stdout and '\x1b' not in done.stdout
    df,_ = load_speed(tmp_path/'x.json')
    assert set(df.contender)=={'BatchNorm','ours'}
    assert is_png(tmp_path/'x.png')

@pytest.mark.parametrize('args,says',
    [([],'subject'), (['fast'],'one of speed'),
    (['speed','--quik'],'--quik'),
    (['speed','--json','x.txt'],'ends in .json'),
    (['speed','--out','no/x.png'],'no folder no'),
    (['speed','--only','7x8x9'],'matches no case'),
    (['speed','--only','('],'not a regular expression'),
    (['speed','--contenders','LayerNorm'],'matches none of'),
    (['speed','--device','tpu'],'cpu or cuda')])
def test_bad_arguments_are_one_line_and_exit_2(args, says, capsys):
    from fastai_runbn.cli import main
    with pytest.raises(SystemExit) as e: main(['bench',*args])
    out,err = capsys.readouterr()
    assert e.value.code==2 and out==''
    assert len(err.splitlines())==1 and says in err, err
