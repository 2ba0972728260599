"Notebooks, modules, README and the two configuration files say the same"
import ast,importlib.util,json,os,re,shutil,subprocess,sys
from collections import Counter
from configparser import ConfigParser
from pathlib import Path
import pytest
try: import tomllib
except ImportError: import tomli as tomllib

root = Path(__file__).resolve().parent.parent
package = root/'fastai_runbn'
by_hand = {'all.py'} # re-exports, from no notebook
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb')
    if '.ipynb_checkpoints' not in p.parts)
project = tomllib.loads((root/'pyproject.toml').read_text())

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the notebooks and configuration, with an empty package, in which nbdev may write"
    d = tmp_path_factory.mktemp('sync')
    ignore = shutil.ignore_patterns('.ipynb_checkpoints')
    shutil.copytree(root/'nbs', d/'nbs', ignore=ignore)
    (d/'fastai_runbn').mkdir()
    for f in ('pyproject.toml','fastai_runbn/__init__.py'):
        shutil.copy(root/f, d/f)
    return d

def nbdev(cmd, cwd):
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'}
    tool = Path(sys.executable).parent/f'nbdev-{cmd}'
    subprocess.run([str(tool)], cwd=cwd, env=env,
        check=True, capture_output=True, text=True)

def modules(d):
    "Their text, by path"
    paths = [p for p in d.rglob('*.py') if '__pycache__' not in p.parts]
    return {p.relative_to(d).as_posix():p.read_text() for p in paths}

def test_modules_are_what_the_notebooks_export(copy):
    nbdev('export', copy)
    made,have = modules(copy/'fastai_runbn'),modules(package)
    assert set(made) == set(have)-by_hand
    for name in made:
        assert made[name] == have[name], (f"fastai_runbn/{name} and its notebook differ: "
            "run nbdev-export, or nbdev-update if the module is right")
    assert (copy/'nbs'/'llms.txt').read_text()==(root/'nbs'/'llms.txt').read_text()

def tool(name):
    "A module of `tools`"
    spec = importlib.util.spec_from_file_location(name, root/'tools'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

house = tool('rooms')
floor = house.rooms() # numbers of notebooks, by module

@pytest.mark.parametrize('name', floor)
def test_a_room_imports_from_those_below_it_by_public_names(name):
    for module,names in house.imported(name):
        if module in floor: assert floor[module]<=floor[name], f'{name} imports from {module}'
        private = [n for n in names if n.startswith('_') and n!='__version__']
        assert not private, f'{name} imports {private} from {module}'

def test_the_map_of_rooms_is_what_they_import():
    assert house.diagram() in (root/'CONTRIBUTING.md').read_text(), 'run python tools/rooms.py'

def test_classes_stand_whole():
    "`@patch` is for classes of others"
    files = {name:name.replace('.', '/')+'.py' for name in floor}
    texts = {name:(package/f).read_text() for name,f in files.items()}
    own = {c for text in texts.values()
        for c in re.findall(r'^class (\w+)', text, re.M)}
    for name,text in texts.items():
        patched = re.findall(r'@patch.*\n(?:@.*\n)*def \w+\((?:self|cls):(\w+)', text)
        assert not own&{*patched}, f'{name}: {own&{*patched}}'

density = tool('counts')

@pytest.mark.parametrize('folder', ['fastai_runbn','fastai_runbn/bench','tests','tools'])
def test_lines_are_light(folder):
    found = density.counts(folder)
    assert {k:v for k,v in found.items() if v>density.limits[k]}=={}, 'see python tools/counts.py'

def test_notebooks_are_clean(copy):
    nbdev('clean', copy)
    for p in notebooks:
        clean = (copy/'nbs'/p.relative_to(root/'nbs')).read_text()
        assert clean == p.read_text(), f"{p.name} is not clean: run nbdev-clean"

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook_is_executed(path):
    """No error is saved, no warning, no path of somebody's machine,
    and what ends in a value or a plot has an output"""
    cells = json.loads(path.read_text())['cells']
    cells = [c for c in cells if c['cell_type']=='code']
    outputs = [o for c in cells for o in c['outputs']]
    assert not [o['evalue'] for o in outputs if o['output_type']=='error']
    assert not [''.join(o['text']) for o in outputs if o.get('name')=='stderr']
    def plain(o): return o.get('data',{}).get('text/plain','')
    texts = [''.join(o.get('text', plain(o))) for o in outputs]
    assert not [t for t in texts if re.search(r'site-packages|/home/|/root/|/tmp/|\.py:\d+:', t)]
    for c in cells:
        src = ''.join(c['source'])
        if 'plt.show()' in src and '#| hide' not in src:
            shown = any('image/png' in o.get('data',{}) for o in c['outputs'])
            assert shown, f"not executed: {src[:80]!r}"

def test_source_that_a_page_shows_is_the_module_s():
    "The page of CUDA kernels prints two of them"
    page = json.loads((root/'nbs'/'03_kernels.cuda.ipynb').read_text())
    cells = [c for c in page['cells'] if 'print(getsource(' in ''.join(c['source'])]
    shown = [''.join(o['text']).strip() for c in cells for o in c['outputs']]
    module = (package/'kernels'/'cuda.py').read_text()
    assert len(shown)==2
    assert all(text in module for text in shown), 'execute the page again'

def test_readme_is_made_from_the_index():
    done = subprocess.run([sys.executable, str(root/'tools/readme.py'), '--check'],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_readme_is_short():
    "700 words before the list of pages, tables counted"
    text,rest = (root/'README.md').read_text().split('## Read on')
    assert rest and len(text.split()) <= 700

def test_settings_ini_equals_pyproject():
    ini = ConfigParser()
    ini.read(root/'settings.ini')
    s,p = ini['DEFAULT'],project['project']
    n = project['tool']['nbdev']
    text = (package/'__init__.py').read_text()
    version = re.search(r'__version__ = "(.+)"', text)[1]
    assert (s['lib_name'], s['version']) == (p['name'], version)
    assert s['description'] == p['description']
    assert s['requirements'].split() == p['dependencies']
    assert s['dev_requirements'].split() == p['optional-dependencies']['dev']
    assert s['keywords'].split() == p['keywords']
    assert s['min_python'] == p['requires-python'].lstrip('>=')
    author, = p['authors']
    assert (s['author'], s['author_email']) == (author['name'], '')
    urls = p['urls']
    assert s['git_url'] == urls['Repository'] == f"https://github.com/{s['user']}/{s['repo']}"
    assert s['doc_host']+s['doc_baseurl'] == urls['Documentation']
    scripts = [f'{k}={v}' for k,v in p['scripts'].items()]
    assert [s['console_scripts']] == scripts
    for k in ('lib_path','nbs_path','doc_path'):
        assert s[k] == n[k]
    assert s['tst_flags'].split() == n['tst_flags']

def test_every_notebook_is_in_the_sidebar():
    listed = re.findall(r'\S+\.ipynb', (root/'nbs/sidebar.yml').read_text())
    there = [p.relative_to(root/'nbs').as_posix() for p in notebooks]
    assert sorted(listed) == sorted(there)

def test_mutations_are_of_the_code_as_it_is():
    """What `tools/mutations.py` breaks stands once in its module,
    and tests/MUTATIONS.md has a row for it, of that code"""
    broken = tool('mutations')
    rows = (root/'tests'/'MUTATIONS.md').read_text()
    everywhere = broken.mutations+broken.in_triton+broken.in_c
    for what,module,old,new,_ in everywhere:
        source = broken.source(package, module).read_text()
        assert source.count(old)==1, what
        row = broken._row(what, module, old, new, Counter()).removesuffix('**nothing**|')
        assert row in rows, f'{what}: run `python tools/mutations.py {what!r}`'

def test_style():
    chkstyle = str(Path(sys.executable).parent/'chkstyle')
    got = subprocess.run([chkstyle, 'fastai_runbn', 'nbs'], cwd=root,
        capture_output=True, text=True)
    assert got.returncode==0, got.stdout
