"""Workflows and issue forms, as far as they can be checked without GitHub; CI has actionlint"""
import re,subprocess,sys
from pathlib import Path
import pytest,yaml
try: import tomllib
except ImportError: import tomli as tomllib

root = Path(__file__).resolve().parent.parent
github = root/'.github'
pytestmark = pytest.mark.skipif(not github.is_dir(), reason='an sdist has no .github')
workflows = sorted(github.glob('workflows/*.yaml'))
forms = [p for p in sorted(github.glob('ISSUE_TEMPLATE/*')) if p.name!='config.yml']
def name(path): return path.name
def read(path): return yaml.safe_load(path.read_text(encoding='utf-8'))
project = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']

def jobs(path): return read(path)['jobs']
def scripts(path):
    "What the steps of a workflow run, by job and number"
    return {f'{j}, step {i}':step['run'] for j,job in jobs(path).items()
        for i,step in enumerate(job['steps']) if 'run' in step}

each_workflow = pytest.mark.parametrize('path', workflows, ids=name)
each_form = pytest.mark.parametrize('path', forms, ids=name)

def test_all_are_found():
    assert {p.stem for p in workflows} == {'docs','release','test'}
    assert {p.stem for p in forms} == {'bug','question'}

schemas = 'vendor.github-workflows','custom.github-workflows-require-timeout'
@each_workflow
@pytest.mark.parametrize('schema', schemas)
def test_workflow_is_valid(path, schema):
    check = sys.executable,'-m','check_jsonschema','--builtin-schema',schema
    done = subprocess.run([*check, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout+done.stderr

@each_workflow
def test_shellcheck_has_nothing_to_say(path):
    "Of what steps run, with a word in the place of each `${{ expression }}`"
    shellcheck = Path(sys.executable).parent/'shellcheck'
    for where,script in scripts(path).items():
        plain = re.sub(r'\$\{\{.*?\}\}', 'expression', script)
        done = subprocess.run([str(shellcheck), '--shell=bash', '-'],
            input=plain, capture_output=True, text=True)
        assert done.returncode == 0, f'{where}: {done.stdout}{done.stderr}'

@each_workflow
def test_no_expression_is_pasted_into_a_script(path):
    "A branch or title may hold anything: a script takes it from its environment"
    for where,script in scripts(path).items(): assert '${{' not in script, where

@each_workflow
def test_files_that_a_workflow_names_are_there(path):
    text = path.read_text(encoding='utf-8')
    named = re.findall(r'(?<![\w/])(?:tests|tools)/[\w.]+', text)
    for file in ['pyproject.toml',*named]: assert (root/file).is_file(), file

def test_pythons_of_ci_are_those_of_the_classifiers():
    listed = [c.rpartition(' ')[2] for c in project['classifiers'] if 'Python :: 3.' in c]
    test = jobs(github/'workflows'/'test.yaml')
    assert test['newest']['strategy']['matrix']['python'] == listed
    steps = test['lowest']['steps']
    used = [s['with']['python-version'] for s in steps if 'setup-python' in s.get('uses', '')]
    assert used == [listed[0]] == [project['requires-python'].removeprefix('>=')]

needs = dict(markdown='value', textarea='label', input='label',
    dropdown='options', checkboxes='options')

@each_form
def test_issue_form_is_as_github_wants_it(path):
    form = read(path)
    assert {'name','description','body'} <= set(form)
    assert set(form['labels']) <= {'bug','question'}, 'labels that a new repository has'
    for part in form['body']: assert part['attributes'][needs[part['type']]], part
    asked = [part for part in form['body'] if part['type']!='markdown']
    ids = [part['id'] for part in asked]
    labels = [part['attributes']['label'] for part in asked]
    assert len({*ids}) == len(ids) and len({*labels}) == len(labels)
    assert any(part.get('validations', {}).get('required') for part in asked)

def test_bug_form_lists_the_ways_to_compute():
    from fastai_runbn.formulas import Formulas
    from fastai_runbn.functional import backends
    from fastai_runbn.kernels.aten import SyncBatchNormParts
    from fastai_runbn.kernels.cpu import Kernels
    asked = {part['id']:part for part in read(github/'ISSUE_TEMPLATE'/'bug.yaml')['body']}
    options = set(asked['path']['attributes']['options'])
    paths = {c.name for c in (Formulas,SyncBatchNormParts,Kernels)}
    assert paths|{*backends}-{'auto'} <= options

def test_contact_links_lead_to_the_documentation():
    links = read(github/'ISSUE_TEMPLATE'/'config.yml')['contact_links']
    pages = {p.stem for p in (root/'nbs'/'tutorials').glob('*.ipynb')}
    for link in links:
        assert {'name','about','url'} == set(link)
        place = link['url'].removeprefix(project['urls']['Documentation'])
        page = re.fullmatch(r'/tutorials/(\w+)\.html', place)
        assert place=='' or page[1] in pages, link
