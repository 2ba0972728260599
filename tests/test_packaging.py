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
    ours = 'PYTHONPATH','PYTHONHOME','IN_TEST'
    env = {k:v for k,v in os.environ.items() if k not in ours}
    command = [str(a) for a in args]
    return subprocess.run(command, cwd=cwd, env=env|new,
        timeout=600, capture_output=True, text=True)

def build(src, out, *args, **new):
    "`python -m build`, with the options that releases are built with"
    project = tomllib.loads((root/'pyproject.toml').read_text())
    settings = project['tool']['cibuildwheel']['config-settings']
    options = [f'-C{k}={v}' for k,v in settings.items()]
    command = sys.executable,'-m','build','--no-isolation'
    done = sh(*command, *options, *args, '--outdir', out, src, cwd=src, **new)
    said = done.stdout+done.stderr
    assert done.returncode == 0, said
    return said

def tracked():
    "What git tracks or would; in an unpacked sdist, where there is no git, what setuptools lists"
    if (root/'.git').exists():
        command = 'git','ls-files','--cached','--others','--exclude-standard'
        listing = sh(*command, cwd=root).stdout
    else: listing = (root/f'{package}.egg-info'/'SOURCES.txt').read_text()
    made = f'{package}.egg-info/','PKG-INFO','setup.cfg'
    files = [f for f in listing.splitlines() if not f.startswith(made)]
    return [f for f in files if (root/f).is_file()]

@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    "Of a copy of what git tracks or would, so that no build leftovers get in; the wheel beside it"
    d = tmp_path_factory.mktemp('dist')
    for f in tracked():
        copy = d/'src'/f
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((root/f).read_bytes())
    build(d/'src', d/'dist')
    return next((d/'dist').glob('*.tar.gz'))

@pytest.fixture(scope='module')
def wheel(sdist): return next(sdist.parent.glob('*.whl'))

@pytest.fixture(scope='module')
def unpacked(sdist, tmp_path_factory):
    "The folder that the sdist holds"
    d = tmp_path_factory.mktemp('unpacked')
    with tarfile.open(sdist) as f: f.extractall(d, filter='data')
    return next(d.iterdir())

@pytest.fixture(scope='module')
def bare_wheel(unpacked, tmp_path_factory):
    "The wheel that comes of the sdist where there is no compiler"
    d = tmp_path_factory.mktemp('bare')
    said = build(unpacked, d/'dist', '--wheel', CC='false')
    assert 'building extension "fastai_runbn.kernels.runbn_cpu" failed' in said
    return next((d/'dist').glob('*.whl'))

def site_packages(env):
    "Of an environment whose bin folder is `env`"
    return next((env.parent/'lib').glob('python*'))/'site-packages'

def installed(wheel, d):
    """The bin folder of a new environment: the wheel is installed, the rest comes from here by a
    path file (this checkout does not)"""
    venv.create(d/'v', with_pip=True)
    bin_ = d/'v/bin'
    here = Path(sysconfig.get_paths()['purelib'])
    (site_packages(bin_)/'borrowed.pth').write_text(f'{here}\n')
    pip = bin_/'python','-m','pip'
    done = sh(*pip, 'install', '--no-deps', '--force-reinstall', wheel, cwd=d)
    assert done.returncode == 0, done.stdout+done.stderr
    return bin_

@pytest.fixture(scope='module')
def env(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp('env'))

@pytest.fixture(scope='module')
def bare_env(bare_wheel, tmp_path_factory):
    return installed(bare_wheel, tmp_path_factory.mktemp('bare_env'))

def folder(env): return site_packages(env)/package
def objects(names):
    "Those that are compiled"
    return [n for n in map(str, names) if n.endswith(('.so','.pyd','.dylib'))]

def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    own = [n for n in names if '.dist-info' not in n]
    assert {n.split('/')[0] for n in own} == {package}
    for n in ('all.py','callback.py','bench/tasks.py','py.typed'): assert f'{package}/{n}' in names
    assert any(n.endswith('licenses/LICENSE') for n in names)

def test_sdist_holds_what_git_tracks(sdist):
    "All of it but what is for GitHub and CI, whose names begin with a dot; beside it setuptools' own"
    top = sdist.name.removesuffix('.tar.gz')
    with tarfile.open(sdist) as f:
        names = {m.name.removeprefix(f'{top}/') for m in f.getmembers() if m.isfile()}
    want = {f for f in tracked() if not f.startswith('.')}
    assert want-names == set(), 'MANIFEST.in'
    more = {n.split('/')[0] for n in names-want}
    assert more == {'PKG-INFO','setup.cfg',f'{package}.egg-info'}

quick = ('test_equations.py', 'test_lockstep.py', 'test_links.py',
    'test_notebooks.py::test_all_are_found',
    'test_sync.py::test_settings_ini_equals_pyproject',
    'test_sync.py::test_readme_is_made_from_the_index',
    'test_sync.py::test_every_notebook_is_in_the_sidebar',
    'test_sync.py::test_mutations_are_of_the_code_as_it_is')

def test_tests_of_the_sdist_run(unpacked, env):
    """Quick ones, with the wheel that came of it: they need helpers, notebooks with their pictures,
    tools, settings.ini, setup.py, CHANGELOG; `-I` so that the package beside them is not imported"""
    pytest_ = env/'python','-I','-m','pytest','-n0','-p','no:cacheprovider'
    done = sh(*pytest_, *[f'tests/{q}' for q in quick], cwd=unpacked)
    assert done.returncode == 0, done.stdout+done.stderr

def test_the_index_takes_them(sdist, wheel, bare_wheel):
    "README renders there, and metadata are whole"
    check = sys.executable,'-m','twine','check','--strict'
    done = sh(*check, sdist, wheel, bare_wheel, cwd=root)
    assert done.returncode == 0, done.stdout+done.stderr
    assert done.stdout.count('PASSED') == 3

def test_imports_from_the_wheel(env, tmp_path):
    code = 'import fastai_runbn.all as a; print(a.__file__); print(a.RunBNCallback())'
    done = sh(env/'python', '-W', 'ignore', '-c', code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path,cb = done.stdout.splitlines()
    assert Path(path).is_relative_to(env.parent) and cb=='RunBNCallback'

def test_demo_runs_outside_the_checkout(env, tmp_path):
    done = sh(env/'runbn', 'demo', '--epochs', '1', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    picture = (tmp_path/'runbn_demo.png').read_bytes()
    assert picture[:4] == b'\x89PNG'
    table = [l.split('│') for l in done.stdout.splitlines() if l.startswith('│')]
    accuracy = {row[1].strip():float(row[2]) for row in table}
    assert accuracy['RunBNCallback()'] > accuracy['BatchNorm']+.2, done.stdout
    # no colours, no bars where there is no terminal
    assert '\x1b' not in done.stdout and '\r' not in done.stdout

bad_arguments = [['demo','--bs','0'], ['demo','--epochs','x'],
    ['demo','--out','a.txt'], ['nonsense'], []]
@pytest.mark.parametrize('args', bad_arguments, ids=' '.join)
def test_bad_arguments_are_one_line_and_exit_2(env, tmp_path, args):
    done = sh(env/'runbn', *args, cwd=tmp_path)
    assert (done.returncode,done.stdout) == (2,'')
    assert len(done.stderr.splitlines()) == 1

def test_help_is_quick_to_load(env, tmp_path):
    "`runbn --help` imports neither torch nor fastai"
    code = ("import sys,fastai_runbn.cli\n"
        "print([m for m in ('torch','fastai','matplotlib') if m in sys.modules])")
    done = sh(env/'python', '-c', code, cwd=tmp_path)
    assert done.stdout.strip() == '[]'
    done = sh(env/'runbn', '--help', cwd=tmp_path)
    assert done.returncode == 0 and 'demo' in done.stdout

def test_source_of_the_kernel_is_in_all_of_them(sdist, wheel, bare_wheel):
    source = f'{package}/kernels/cpu.c'
    for w in (wheel,bare_wheel): assert source in zipfile.ZipFile(w).namelist()
    with tarfile.open(sdist) as f: names = f.getnames()
    top = sdist.name.removesuffix('.tar.gz')
    assert f'{top}/{source}' in names
    assert not objects(names)

@compiled
def test_one_wheel_serves_all_pythons(wheel):
    assert '-cp310-abi3-' in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert objects(names) == [f'{package}/kernels/runbn_cpu.abi3.so']

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
    found = objects(kernels.glob('*'))
    old = [o for o in found if os.stat(o).st_mtime < changed]
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
    def size_and_time(p):
        s = p.stat()
        return s.st_size,s.st_mtime_ns
    def look():
        found = [folder(env),*folder(env).rglob('*')]
        return {p:size_and_time(p) for p in found}
    before = look()
    dirs = [p for p in before if p.is_dir()]
    for p in dirs: p.chmod(0o555)
    python = env/'python','-W','ignore'
    try: done = sh(*python, '-c', step, cwd=tmp_path, PYTHONDONTWRITEBYTECODE='1')
    finally:
        for p in dirs: p.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == path
    assert look() == before
