"What a surgery report and surgery's errors say, to the letter: a person reads them"
import pytest,torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops.misc import FrozenBatchNorm2d
from fastai_runbn import surgery
from fastai_runbn.layers import RunningBatchNorm2d,set_batch_size
from fastai_runbn.surgery import NormRow,SurgeryReport,register_norm,surgery_report,to_bn,to_runbn

parametrize = pytest.mark.parametrize

rows = [
    NormRow('', 'BatchNorm2d', 'RunningBatchNorm2d', 16, 'running', '',
        skipped=1, points=8, samples=1),
    NormRow('body.1', 'BatchNorm1d', 'RunningBatchNorm1d', 128, 'running', "excluded by 'body.*'",
        skipped=3, points=1, samples=2),
    NormRow('head', 'FrozenBatchNorm2d', '', None, 'left alone', "it is frozen")]
report = SurgeryReport(rows, {'GroupNorm':2,'LayerNorm':1}, 'Filters: none')
head = ('2 running norms, 0 convertible, 1 left alone, 2 with skipped batches; '
    'also 2 GroupNorm, 1 LayerNorm', 'Filters: none')
cells = [
    ['layer', 'from', 'to', 'channels', 'status', 'why'],
    ['(the model)', 'BatchNorm2d', 'RunningBatchNorm2d', '16', 'running',
        '8 rows, counted as 1 sample, skipped 1 batch with NaN or infinity'],
    ['body.1', 'BatchNorm1d', 'RunningBatchNorm1d', '128', 'running',
        "excluded by 'body.*', 1 row, counted as 2 samples, "
        "skipped 3 batches with NaN or infinity"],
    ['head', 'FrozenBatchNorm2d', '', '', 'left alone', 'it is frozen']]

@pytest.fixture(autouse=True)
def kernels_are_there(monkeypatch):
    "A line says where they are not, which is not what these tests are about"
    monkeypatch.setattr(SurgeryReport, 'computed', '')

def test_a_report_in_a_terminal():
    "Columns begin below each other, two spaces apart"
    first,second,*table = repr(report).split('\n')
    assert (first,second)==head
    starts = 0,13,32,52,62,74
    for line,want in zip(table, cells, strict=True):
        ends = *starts[1:],None
        assert [line[a:b].rstrip() for a,b in zip(starts, ends)]==want
        assert line==line.rstrip()

def test_a_report_in_a_notebook():
    said = report._repr_markdown_().split('\n')
    assert said[:4]==[head[0],'',head[1],'']
    rule = ['---']*6
    table = [cells[0],rule,*cells[1:]]
    assert said[4:]==[f"|{'|'.join(row)}|" for row in table]
    page = report._repr_html_()
    assert page.startswith(f'<p>{head[0]}</p>\n<p>{head[1]}</p>\n<table')
    assert page.count('<th>')==6 # columns, and no numbers of rows
    for row in cells:
        for cell in row: assert f'>{cell}<' in page.replace('&#x27;', "'")

def test_a_report_without_norms_is_a_line():
    assert repr(surgery_report(nn.Linear(2,2)))=='0 running norms, 0 convertible, 0 left alone'

def test_one_is_singular():
    said = repr(surgery_report(to_runbn(nn.BatchNorm2d(3))))
    assert said.startswith('1 running norm, 0 convertible')

def running_row(name, old, channels, why='', **counts):
    "Of a running norm in the place of an `old`"
    return NormRow(name, old, f'Running{old}', channels, 'running', why, **counts)

def test_rows_of_a_model():
    model = nn.Sequential(to_runbn(nn.BatchNorm2d(3)), nn.BatchNorm3d(4), FrozenBatchNorm2d(5))
    assert surgery_report(model).rows==[
        running_row('0', 'BatchNorm2d', 3),
        NormRow('1', 'BatchNorm3d', 'RunningBatchNorm3d', 4, 'convertible', ''),
        NormRow('2', 'FrozenBatchNorm2d', '', None, 'left alone',
            "FrozenBatchNorm2d is not PyTorch's BatchNorm")]

def test_rows_that_are_not_samples_are_told():
    "As the points of clouds"
    model = to_runbn(nn.BatchNorm1d(3))
    def row_after(rows, samples=None):
        set_batch_size(model, samples)
        model(torch.randn(rows,3))
        row, = surgery_report(model).rows
        return row
    told = running_row('', 'BatchNorm1d', 3, points=6, samples=2)
    silent = running_row('', 'BatchNorm1d', 3)
    assert row_after(6, 2)==told
    assert row_after(6)==row_after(6, 6)==silent

def test_a_row_of_a_class_without_a_twin():
    class Mine(RunningBatchNorm2d): pass
    row, = surgery_report(Mine(3)).rows
    assert row==NormRow('', 'Mine', 'Mine', 3, 'running', '')

def own_class():
    class Mine(nn.BatchNorm2d):
        def forward(self, x): return x
    return Mine(3)
reasons = {
    'an own class':(own_class(), 'Mine is a BatchNorm2d with a `forward` of its own, '
        'which converting would drop: register a twin with `register_norm`'),
    'lazy':(nn.LazyBatchNorm2d(),
        'LazyBatchNorm2d is not materialised: run a batch through the model first'),
    'parametrized':(weight_norm(nn.BatchNorm2d(3)),
        'ParametrizedBatchNorm2d is parametrized: remove the parametrization first'),
    'without statistics':(nn.BatchNorm2d(3, track_running_stats=False),
        'track_running_stats=False: it keeps no statistics, and a running norm has to')}
@parametrize('layer,why', reasons.values(), ids=reasons)
def test_why_a_layer_is_left_alone(layer, why):
    row, = surgery_report(layer).rows
    assert (row.status,row.to,row.why) == ('left alone','',why)

def test_what_was_not_chosen():
    def statuses(**kw): return {r.name:(r.status,r.why) for r in surgery_report(model, **kw).rows}
    model = nn.ModuleDict({k:nn.BatchNorm2d(3) for k in ('stem','head')})
    convertible = 'convertible',''
    for kw,why in ((dict(exclude='h*'),"excluded by 'h*'"),
            (dict(include=['stem']),"not in include=['stem']"),
            (dict(filter_fn=lambda m,name: name!='head'),'filter_fn said no')):
        assert statuses(**kw)==dict(stem=convertible, head=('left alone',why))

def test_a_layer_is_chosen_by_each_of_its_names():
    shared = nn.BatchNorm2d(3)
    model = nn.ModuleDict(dict(first=shared, second=shared))
    row, = surgery_report(model, include='second').rows
    assert (row.name,row.status) == ('first','convertible')

def test_each_pattern_has_to_match():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="exclude='2' matches no norm layer"):
        surgery_report(model, exclude=['1','2'])

def test_wrapped_models_are_named():
    wrapped = nn.DataParallel(nn.BatchNorm2d(3))
    with pytest.raises(TypeError, match='^the model is wrapped in DataParallel'): to_runbn(wrapped)
    inside = nn.Sequential(wrapped)
    with pytest.raises(TypeError, match='^`0` is wrapped in DataParallel'): to_runbn(inside)

lazy = 'lazy norms are left alone. Run a batch through the model first, then convert.'
warned = {
    'lazy':([nn.LazyBatchNorm2d], f"'0': {lazy}"),
    'two lazy':([nn.LazyBatchNorm2d]*2, f"'0' and 1 more: {lazy}"),
    'three lazy':([nn.LazyBatchNorm2d]*3, f"'0' and 2 more: {lazy}"),
    'none':([nn.Identity], 'Nothing to convert in Sequential: 0 running norms, 0 convertible, '
        '0 left alone. `surgery_report(model)` tells why.')}
@parametrize('layers,said', warned.values(), ids=warned)
def test_a_warning_is_of_the_line_that_converts(layers, said):
    model = nn.Sequential(*[layer() for layer in layers])
    with pytest.warns(UserWarning) as caught: to_runbn(model)
    w, = [w for w in caught if 'Lazy modules' not in str(w.message)]
    assert (str(w.message),w.filename) == (said,__file__)

@parametrize('n,said', [(8,"'7'; a container"),(9,"'7', …; a container")])
def test_an_error_names_eight_layers(n, said):
    model = nn.Sequential(*[nn.BatchNorm2d(2) for _ in range(n)])
    with pytest.raises(ValueError) as e: to_runbn(model, include='Xception')
    names = f"Their names are '0', '1', '2', '3', '4', '5', '6', {said}"
    assert f"{names}'s layers are 'Xception.*'." in str(e.value)

def test_a_running_norm_of_a_class_without_a_twin():
    class Mine(RunningBatchNorm2d): pass
    model = nn.Sequential(Mine(3))
    said = r'^Mine has no BatchNorm to go back to: name its twin with `register_norm`\.$'
    with pytest.raises(TypeError, match=said): to_bn(model)
    assert type(model[0]) is Mine

def test_a_twin_that_was_made_by_itself_goes_back(monkeypatch):
    "Of a class that surgery does not know yet, as nothing of timm was converted before"
    timm = pytest.importorskip('timm')
    from fastai_runbn.twins import RunningBatchNormAct2d
    old = timm.layers.BatchNormAct2d
    def forget():
        monkeypatch.delitem(surgery.norm_twins, old, raising=False)
        monkeypatch.delitem(surgery._plain, RunningBatchNormAct2d, raising=False)
    forget()
    row, = surgery_report(RunningBatchNormAct2d(4)).rows
    assert (row.type,row.to) == ('BatchNormAct2d','RunningBatchNormAct2d')
    forget()
    assert type(to_bn(RunningBatchNormAct2d(4))) is old

def test_twins_that_cannot_be():
    class Old(nn.BatchNorm2d): pass
    class Other(nn.BatchNorm2d): pass
    class NotRunning(Old): pass
    class Running(Old, Other, RunningBatchNorm2d): pass
    with pytest.raises(TypeError, match='has to be a subclass of Old and of a running norm'):
        register_norm(Old, NotRunning)
    register_norm(Old, Running)
    register_norm(Old, Running) # once more is the same
    said = '^register_norm: Running is the twin of Old already; make another class.$'
    with pytest.raises(ValueError, match=said): register_norm(Other, Running)
