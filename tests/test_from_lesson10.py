"Checkpoints of lesson 10's layer, odd ones too"
import copy
import pytest,torch
from torch import nn
from fastai_runbn.all import from_lesson10,to_runbn
from fastai_runbn.reference import ReferenceRunningBatchNorm

def trained(steps, bs=4, shift=1., affine=True, **kw):
    torch.manual_seed(1)
    m = ReferenceRunningBatchNorm(3, affine=affine).to(**kw)
    if affine: nn.init.normal_(m.mults), nn.init.normal_(m.adds)
    for _ in range(steps):
        m((torch.randn(bs,3,5,5)+shift).to(**kw))
    return m.eval()

@pytest.mark.parametrize('steps', [1,4,5,99,101])
@pytest.mark.parametrize('affine', [True,False])
def test_evaluation_is_the_same(steps, affine):
    old,x = (trained(steps, affine=affine, dtype=torch.float64),
        torch.randn(2,3,5,5).double())
    for new in (nn.BatchNorm2d(3, affine=affine),
            to_runbn(nn.BatchNorm2d(3, affine=affine))):
        new.double().load_state_dict(from_lesson10(old.state_dict()))
        assert torch.allclose(new.eval()(x), old(x), rtol=1e-12, atol=1e-12)
    new.refresh_window() # as the next training forward does
    # a full window
    assert new.num_batches_tracked==steps and (new.window_count==-1).all()

@pytest.mark.parametrize('scale', [.01,1.])
def test_floor_of_the_first_twenty_samples(scale):
    m = ReferenceRunningBatchNorm(3).double()
    m(torch.randn(4,3,5,5).double()*scale)
    x,new = (torch.randn(2,3,5,5).double(),
        nn.BatchNorm2d(3).double().eval())
    new.load_state_dict(from_lesson10(m.state_dict()))
    assert torch.allclose(new(x), m.eval()(x), rtol=1e-12, atol=1e-12)

def test_untrained_is_an_untrained_batchnorm():
    sd,want = (from_lesson10(ReferenceRunningBatchNorm(3).state_dict()),
        nn.BatchNorm2d(3).state_dict())
    assert (sd.keys()==want.keys()
        and all(torch.equal(sd[k], want[k]) for k in want))

def test_without_batch_step_and_dbias():
    "As the last form in course-v3: trained for long, as nothing says otherwise"
    sd = trained(50, dtype=torch.float64).state_dict()
    want = from_lesson10(sd)
    got = from_lesson10(
        {k:v for k,v in sd.items() if k not in ('batch','step','dbias')}
        | dict(factor=torch.ones(3), offset=torch.ones(3)))
    assert got.keys()==want.keys() and got.pop('num_batches_tracked')==0
    assert all(torch.equal(got[k], want[k]) for k in got)
    m = to_runbn(nn.BatchNorm2d(3)).double()
    m.load_state_dict(
        got | dict(num_batches_tracked=torch.tensor(0)))
    m.refresh_window()
    assert (m.samples_seen>=2**40).all() # warmed up

def test_cancellation_gives_no_negative_variance():
    sd = trained(30, shift=3e4).state_dict()
    # the old layer is NaN here
    assert ((sd['sqrs']/sd['count']-(sd['sums']/sd['count'])**2)<0).any()
    assert (from_lesson10(sd)['running_var']>=0).all()

@pytest.mark.parametrize('dtype',
    [torch.float16,torch.bfloat16,torch.float32,torch.float64])
def test_statistics_are_float32_at_least(dtype):
    res = from_lesson10({k:v.to(dtype)
        for k,v in trained(30).state_dict().items()})
    assert (res['running_mean'].dtype==res['running_var'].dtype
        ==(torch.float64 if dtype==torch.float64 else torch.float32))
    assert res['weight'].dtype==dtype

@pytest.mark.parametrize('prefix', ['','module.','model.0.layers.3.'])
def test_any_prefix_and_nothing_else(prefix):
    sd = ({prefix+k:v for k,v in trained(3).state_dict().items()}
        | {'other.sums':torch.ones(2), 'x.batch':torch.ones(1)})
    before = copy.deepcopy(sd)
    res = from_lesson10(sd)
    assert {*res} == (
        {prefix+k for k in nn.BatchNorm2d(3).state_dict()}
        | {'other.sums','x.batch'})
    assert (sd.keys()==before.keys()
        and all(torch.equal(sd[k], before[k]) for k in sd))

@pytest.mark.parametrize('batch,floor', [(19,.01),(20,0.)])
def test_the_clamp_is_over_after_20_samples(batch, floor):
    "As in the evaluation of the layer that the checkpoint is of"
    sd = {**trained(3).state_dict(), 'batch':torch.tensor(batch)}
    sd['sqrs'] = (sd['sums']/sd['count'])**2*sd['count'] # a variance of 0
    var = from_lesson10(sd)['running_var']
    assert var.min().item()==pytest.approx(floor, abs=1e-5)

@pytest.mark.parametrize('left_out', ['sums','sqrs','count'])
def test_another_layers_keys_stay(left_out):
    "Only a layer with all three is lesson 10's"
    kept = [k for k in ('sums','sqrs','count') if k!=left_out]
    others = {f'other.{k}':torch.ones(2) for k in kept}
    res = from_lesson10({**trained(3).state_dict(), **others})
    assert {k for k in res if k.startswith('other.')}=={*others}

def test_a_checkpoint_without_them():
    bn = nn.BatchNorm2d(3).state_dict()
    said = ("from_lesson10: no layer has the keys sums, sqrs and count; there are 'weight', "
        "'bias', 'running_mean', 'running_var', 'num_batches_tracked'.")
    with pytest.raises(ValueError) as e: from_lesson10(bn)
    assert str(e.value)==said
    with pytest.raises(ValueError) as e: from_lesson10(dict(model=bn, opt={}))
    assert str(e.value).endswith(
        "there are 'model', 'opt'. It looks like one of `learn.save`: give its 'model'.")
