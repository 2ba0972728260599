"""The sdist, and wheels built from it with and without a compiler, each installed into an
environment of its own that only borrows the heavy packages of this one"""
import ctypes,os,shutil,subprocess,sys,sysconfig,tarfile,venv,zipfile
from pathlib import Path
import pytest
try: import tomllib
except ImportError: import tomli as tomllib

symbols = ('runbn_forward','runbn_backward') # what the library calls in the object

root = Path(__file__).resolve().parent.parent
package = 'fastai_runbn'
cc = (os.environ.get('CC') or sysconfig.get_config_var('CC') or 'cc').split()[0]
compiled = pytest.mark.skipif(not shutil.which(cc), reason=f'no C compiler ({cc})')

def sh(*args, cwd, **new):
    "Run; `new` are variables of its environment"
    env = {k:v for k,v in os.environ.items() if k not in ('PYTHONPATH','PYTHONHOME','IN_TEST')}|new
    return subprocess.run([str(a) for a in args], cwd=cwd, env=env, timeout=600,
                          capture_output=True, text=True)

def build(src, out, *args, **new):
    "`python -m build`, with the options that releases are built with"
    project = tomllib.loads((root/'pyproject.toml').read_text())
    options = [f'-C{k}={v}' for k,v in project['tool']['cibuildwheel']['config-settings'].items()]
    done = sh(sys.executable, '-m', 'build', '--no-isolation', *options, *args,
              '--outdir', out, src, cwd=src, **new)
    assert done.returncode == 0, done.stdout+done.stderr
    return done.stdout+done.stderr

@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    "Of a copy of what git tracks or would, so that no build leftovers get in; the wheel beside it"
    d = tmp_path_factory.mktemp('dist')
    files = sh('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=root).stdout.splitlines()
    for f in files:
        if (root/f).is_file():
            (d/'src'/f).parent.mkdir(parents=True, exist_ok=True)
            (d/'src'/f).write_bytes((root/f).read_bytes())
    build(d/'src', d/'dist')
    return next((d/'dist').glob('*.tar.gz'))

@pytest.fixture(scope='module')
def wheel(sdist): return next(sdist.parent.glob('*.whl'))

@pytest.fixture(scope='module')
def bare_wheel(sdist, tmp_path_factory):
    "The wheel that comes of the sdist where there is no compiler"
    d = tmp_path_factory.mktemp('bare')
    with tarfile.open(sdist) as f: f.extractall(d, filter='data')
    said = build(next(d.iterdir()), d/'dist', '--wheel', CC='false')
    assert 'building extension "fastai_runbn.kernels.runbn_cpu" failed' in said
    return next((d/'dist').glob('*.whl'))

def installed(wheel, d):
    "The bin folder of a new environment: the wheel is installed, the rest comes from here by a path file (this checkout does not)"
    venv.create(d/'v', with_pip=True)
    here = Path(sysconfig.get_paths()['purelib'])
    there = next((d/'v'/'lib').glob('python*'))/'site-packages'
    (there/'borrowed.pth').write_text(f'{here}\n')
    done = sh(d/'v/bin/python', '-m', 'pip', 'install', '--no-deps', '--force-reinstall', wheel, cwd=d)
    assert done.returncode == 0, done.stdout+done.stderr
    return d/'v/bin'

@pytest.fixture(scope='module')
def env(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp('env'))

@pytest.fixture(scope='module')
def bare_env(bare_wheel, tmp_path_factory):
    return installed(bare_wheel, tmp_path_factory.mktemp('bare_env'))

def folder(env): return next((env.parent/'lib').glob('python*'))/'site-packages'/package
def objects(names): return [n for n in map(str, names) if n.endswith(('.so','.pyd','.dylib'))]

def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split('/')[0] for n in names if '.dist-info' not in n} == {'fastai_runbn'}
    for n in ('fastai_runbn/all.py','fastai_runbn/callback.py','fastai_runbn/bench/tasks.py'): assert n in names
    assert any(n.endswith('licenses/LICENSE') for n in names)

def test_imports_from_the_wheel(env, tmp_path):
    done = sh(env/'python', '-W', 'ignore', '-c', 'import fastai_runbn.all as a; print(a.__file__); print(a.RunBNCallback())', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path,cb = done.stdout.splitlines()
    assert Path(path).is_relative_to(env.parent) and cb=='RunBNCallback'

def test_demo_runs_outside_the_checkout(env, tmp_path):
    done = sh(env/'runbn', 'demo', '--epochs', '1', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    assert (tmp_path/'runbn_demo.png').read_bytes()[:4] == b'\x89PNG'
    acc = {l.split('│')[1].strip():float(l.split('│')[2]) for l in done.stdout.splitlines() if l.startswith('│')}
    assert acc['RunBNCallback()'] > acc['BatchNorm']+.2, done.stdout
    assert '\x1b' not in done.stdout and '\r' not in done.stdout        # no colours, no bars where there is no terminal

@pytest.mark.parametrize('args', [['demo','--bs','0'], ['demo','--epochs','x'], ['demo','--out','a.txt'], ['nonsense'], []], ids=' '.join)
def test_bad_arguments_are_one_line_and_exit_2(env, tmp_path, args):
    done = sh(env/'runbn', *args, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2,'',1)

def test_help_is_quick_to_load(env, tmp_path):
    "`runbn --help` imports neither torch nor fastai"
    code = "import sys,fastai_runbn.cli; print([m for m in ('torch','fastai','matplotlib') if m in sys.modules])"
    assert sh(env/'python', '-c', code, cwd=tmp_path).stdout.strip() == '[]'
    done = sh(env/'runbn', '--help', cwd=tmp_path)
    assert done.returncode == 0 and 'demo' in done.stdout

def test_source_of_the_kernel_is_in_all_of_them(sdist, wheel, bare_wheel):
    for w in (wheel,bare_wheel): assert f'{package}/kernels/cpu.c' in zipfile.ZipFile(w).namelist()
    with tarfile.open(sdist) as f: names = f.getnames()
    assert sdist.name.removesuffix('.tar.gz')+f'/{package}/kernels/cpu.c' in names
    assert not objects(names)

@compiled
def test_one_wheel_serves_all_pythons(wheel):
    assert '-cp310-abi3-' in wheel.name
    assert objects(zipfile.ZipFile(wheel).namelist()) == [f'{package}/kernels/runbn_cpu.abi3.so']

@compiled
def test_object_loads(env):
    path, = objects(folder(env).rglob('*'))
    lib = ctypes.CDLL(path)
    assert [s for s in symbols if not hasattr(lib, s)] == []

def test_no_object_without_a_compiler(bare_wheel, bare_env):
    assert not objects(zipfile.ZipFile(bare_wheel).namelist())
    assert not objects(folder(bare_env).rglob('*'))

def test_object_of_this_checkout_is_as_new_as_its_source():
    "As the extension is optional, a failure to compile leaves an old object there, and says little"
    kernels = root/package/'kernels'
    changed = (kernels/'cpu.c').stat().st_mtime
    old = [o for o in objects(kernels.glob('*')) if os.stat(o).st_mtime < changed]
    assert not old, 'run `pip install -ve .`'

step = """
import torch
from fastai_runbn.layers import RunningBatchNorm2d
layer = RunningBatchNorm2d(4)
opt = torch.optim.SGD(layer.parameters(), 1.)
layer(torch.randn(2,4,8,8)).pow(2).sum().backward()
opt.step()
assert layer.weight.isfinite().all() and (layer.weight!=1).any()
print(layer.path)
"""

kinds = [pytest.param('env', 'cpu', marks=compiled), ('bare_env','formulas')]

@pytest.mark.parametrize('kind,path', kinds)
def test_trains_in_a_folder_it_may_not_write(request, tmp_path, kind, path):
    "For root, who may, what lies there is compared; a folder's time tells if anything came or went"
    env = request.getfixturevalue(kind)
    def look():
        found = [folder(env),*folder(env).rglob('*')]
        return {p:(p.stat().st_size,p.stat().st_mtime_ns) for p in found}
    before = look()
    dirs = [p for p in before if p.is_dir()]
    for p in dirs: p.chmod(0o555)
    try: done = sh(env/'python', '-W', 'ignore', '-c', step, cwd=tmp_path,
                   PYTHONDONTWRITEBYTECODE='1')
    finally:
        for p in dirs: p.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == path
    assert look() == before
