"The wheel, installed into an environment of its own that only borrows the heavy packages of this one"
import os,subprocess,sys,sysconfig,venv,zipfile
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent

def sh(*args, cwd, **kwargs):
    env = {k:v for k,v in os.environ.items() if k not in ('PYTHONPATH','PYTHONHOME','IN_TEST')}
    return subprocess.run([str(a) for a in args], cwd=cwd, env=env, capture_output=True, text=True, timeout=600, **kwargs)

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy of what git tracks or would, so that no build leftovers get in"
    d = tmp_path_factory.mktemp('wheel')
    files = sh('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=root).stdout.splitlines()
    for f in files:
        if (root/f).is_file():
            (d/'src'/f).parent.mkdir(parents=True, exist_ok=True)
            (d/'src'/f).write_bytes((root/f).read_bytes())
    done = sh(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', d/'dist', d/'src', cwd=d)
    assert done.returncode == 0, done.stdout+done.stderr
    return next((d/'dist').glob('*.whl'))

@pytest.fixture(scope='module')
def env(wheel, tmp_path_factory):
    "The bin folder of a new environment: the wheel is installed, the rest comes from here by a path file (this checkout does not)"
    d = tmp_path_factory.mktemp('env')
    venv.create(d/'v', with_pip=True)
    here = Path(sysconfig.get_paths()['purelib'])
    there = next((d/'v'/'lib').glob('python*'))/'site-packages'
    (there/'borrowed.pth').write_text(f'{here}\n')
    done = sh(d/'v/bin/python', '-m', 'pip', 'install', '--no-deps', '--force-reinstall', wheel, cwd=d)
    assert done.returncode == 0, done.stdout+done.stderr
    return d/'v/bin'

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
