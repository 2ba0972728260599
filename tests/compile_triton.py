"""What Triton's compiler makes of the kernels for GPUs that are not here. Run as a program, it
compiles all that a forward and a backward of some calls would launch, and prints a line of JSON for
each kernel and architecture"""
import json,os,re,subprocess,sys,tempfile
from pathlib import Path
if __name__=='__main__': os.environ.pop('TRITON_INTERPRET', None)
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastai_runbn.formulas import Step
from fastai_runbn.kernels import cuda
from fastai_runbn.kernels.cuda import TritonKernels
from pairs import laid_out,narrow,new_state

names = {torch.float32:'fp32', torch.float16:'fp16', torch.bfloat16:'bf16',
    torch.int64:'i64', torch.int32:'i32'}
ptxas = Path(triton.__file__).parent/'backends/nvidia/bin/ptxas'

def source(kernel, args):
    "The kernel, specialised as a launch with `args` would do it"
    types,constants,hints = {},{},{}
    given = zip(kernel.params, args, strict=True)
    for i,(p,v) in enumerate(given):
        whole = type(v) is int and not p.is_constexpr
        free = whole and not p.do_not_specialize
        tensor = torch.is_tensor(v)
        if p.is_constexpr or v is None or free and v==1:
            types[p.name] = 'constexpr'
            constants[(i,)] = v
        elif tensor: types[p.name] = '*'+names[v.dtype]
        else: types[p.name] = 'i32' if whole else 'fp32'
        aligned = tensor and not p.do_not_specialize_on_alignment
        multiple = free and v!=1 and v%16==0
        if aligned or multiple: hints[(i,)] = [['tt.divisibility',16]]
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=hints)

def look(kernel, args, warps, arch):
    "Registers a thread, bytes spilt and shared, instructions of interest"
    built = triton.compile(source(kernel, args),
        target=GPUTarget('cuda', arch, 32), options=dict(num_warps=warps))
    ptx = built.asm['ptx']
    with tempfile.TemporaryDirectory() as d:
        Path(d,'k.ptx').write_text(ptx)
        name = re.search(r'\.target (\S+?)[,\s]', ptx)[1]
        command = [ptxas,'-v',f'--gpu-name={name}',f'{d}/k.ptx','-o',f'{d}/k.cubin']
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stderr
    def number(pattern): return int((re.search(pattern, said) or [0,0])[1])
    def count(pattern): return len(re.findall(pattern, ptx))
    return dict(kernel=kernel.__name__, arch=arch, warps=warps,
        registers=number(r'Used (\d+) registers'),
        spilt=number(r'(\d+) bytes spill stores'),
        shared=built.metadata.shared,
        float_atomics=count(r'(?:atom|red)\.\S*\.f(?:16|32|64)'),
        wide_loads=count(r'ld\.global\.\S*v4\.b32|ld\.global\.\S*v2\.b64'))

def first_launch(self, kernel, args, constants):
    "In the place of a plan's: compile, print, and do nothing"
    case = dict(shape=shape, layout=layout, dtype=names[dtype], call=call, grid=self.grid)
    for arch in (80,90):
        seen = look(kernel, (*args,*constants), self.warps, arch)
        print(json.dumps(case | seen), flush=True)
    return (lambda *args: None),None,None

calls = dict(default={}, # settings that differ from those below
    silu=dict(act='silu'),
    momentum=dict(momentum=.1), cumulative=dict(momentum=None),
    lesson10=dict(average=None, running_grad=0., inclusive=True),
    held=dict(update=False),
    scheduled=dict(weight=torch.tensor(.3), running_grad=torch.tensor(.5)),
    adaptive=dict(longest=200.), each=dict(weight=torch.rand(64)))
if __name__=='__main__':
    torch.set_num_threads(1)
    cuda.Plan.first_launch = first_launch
    cuda.current_stream = lambda index: 0
    dtype = getattr(torch, sys.argv[1])
    for shape,layout,call in map(json.loads, sys.argv[2:]):
        N,C = shape[:2]
        step = Step(N, .3, .1, running_grad=1.)
        step = step._replace(**calls.get(call, {}))
        state = new_state(C, known=call!='unknown')
        state = narrow(state, torch.float32)
        x = laid_out(torch.empty(shape, dtype=dtype), layout)
        w = None if call=='no affine' else torch.ones(C)
        affine = w,w
        if call=='parts':
            saved = TritonKernels.statistics(x, state, step)
            TritonKernels.moments(x)
            TritonKernels.normalize(x, *affine, saved, step)
            TritonKernels.sums(x, x, *affine, saved, step)
            G,_ = TritonKernels.reaction(x, x, *affine, saved, state.grad,
                step=step, scale=torch.tensor(2.))
            TritonKernels.dx(x, x, *affine, saved, G, step)
        else:
            y,saved = TritonKernels.forward(x, *affine, state, step)
            TritonKernels.backward(x, x, *affine, saved, state.grad,
                step=step, need_dx=call!='no dx')
