"What a type checker makes of the library: basedpyright, which is pyright with a node of its own"
import ast,json,os,shutil,subprocess,sys
from pathlib import Path
from typing import get_args,get_type_hints
import pytest,typed_use
from fastai_runbn.distributed import SyncMode,sync_modes
from fastai_runbn.layers import RunBNSettings,runbn_settings
from learners import fit,make

root = Path(__file__).resolve().parent.parent
package = root/'fastai_runbn'
rooms = ['all','reference','moments','formulas','functional','layers','twins','surgery','schedule',
    'filters','distributed','graph','callback','lightning','interpret']
of_fastai = {f'interpret.RunBNInterpretation.{o}' for o in ('__init__','from_learner','compare',
    'disparity','tile_mismatch','plot_tiles')} | {'callback.to_runbn','callback.to_bn'}
rules = dict(typeCheckingMode='standard', reportUnnecessaryTypeIgnoreComment='error',
    reportWildcardImportFromLibrary=False)

def checker(folder, *args):
    "What basedpyright says in the folder of a project that has this library installed"
    tool = Path(sys.executable).parent/'basedpyright'
    command = [str(tool), '--outputjson', '--pythonpath', sys.executable, *args]
    env = dict(os.environ, PYTHONPATH=str(root))
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode in (0,1), done.stdout+done.stderr # 1: there are errors
    return json.loads(done.stdout)

@pytest.fixture(scope='module')
def symbols(tmp_path_factory):
    "What the library shows, by name; types that other packages leave unknown are not minded"
    folder = tmp_path_factory.mktemp('types')
    said = checker(folder, '--ignoreexternal', '--verifytypes', 'fastai_runbn')
    found = said['typeCompleteness']['symbols']
    return {s['name'].removeprefix('fastai_runbn.'):s for s in found if s['isExported']}

def faults(name, symbol):
    "Parameters and results of a function, method or property that have no type, or half of one"
    texts = [d['message'] for d in symbol['diagnostics']]
    found = [t for t in texts if 'annotation' in t and t.endswith(' is missing')]
    if symbol['category']!='variable' and name not in of_fastai: # those take a Learner or its data
        found += [t for t in texts if t.endswith(' is unknown') or 'Unknown' in t]
    return found

@pytest.mark.parametrize('room', rooms)
def test_public_functions_have_types(symbols, room):
    own = {n:s for n,s in symbols.items() if n.split('.')[0]==room}
    assert own
    assert {n:f for n,s in own.items() if (f := faults(n, s))}=={}

def arguments(path):
    "Each function of a module, with its arguments and their defaults, or `None`"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.FunctionDef): continue
        a = node.args
        named = [*a.posonlyargs, *a.args]
        defaults = [None]*(len(named)-len(a.defaults))+a.defaults
        yield node,[*zip(named, defaults), *zip(a.kwonlyargs, a.kw_defaults)]

@pytest.mark.parametrize('room', rooms)
def test_what_may_be_none_says_so(room):
    for f,args in arguments(package/f'{room}.py'):
        for arg,default in args:
            is_none = isinstance(default, ast.Constant) and default.value is None
            if not is_none or arg.annotation is None: continue
            said = ast.unparse(arg.annotation)
            assert 'None' in said, f'{f.name}: {arg.arg}:{said}=None'

def test_overloads_take_what_the_function_takes():
    names = [{a.arg for a,_ in args}|{f.args.kwarg.arg}
        for f,args in arguments(package/'surgery.py') if f.name=='to_runbn']
    assert len(names)==3 and names[0]==names[1]==names[2]

def test_keywords_are_the_settings():
    hints = get_type_hints(runbn_settings)
    hints.pop('return')
    assert get_type_hints(RunBNSettings)==hints
    assert get_args(SyncMode)==(*sync_modes,)

def test_all_lists_what_it_imports():
    "For without a list a checker takes names that a typed package imports for its own affair"
    path = package/'all.py'
    nodes = ast.parse(path.read_text()).body
    names = [a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names]
    assert typed_use.typed.__all__==names

def test_a_user_s_code_gets_its_types(tmp_path):
    shutil.copy(root/'tests'/'typed_use.py', tmp_path)
    (tmp_path/'pyrightconfig.json').write_text(json.dumps(rules))
    said = checker(tmp_path)
    assert said['summary']['filesAnalyzed']==1
    assert [(o['range']['start']['line']+1,o['message']) for o in said['generalDiagnostics']]==[]

def test_what_is_typed_runs():
    typed_use.models()
    typed_use.layers()
    learn = make('plain', typed_use.callbacks())
    fit(learn)
    typed_use.looked_at(learn)
