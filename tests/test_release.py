"""Files that say again what pyproject.toml says: version, addresses, requirements in CHANGELOG.md,
CITATION.cff, the conda recipe and CI's constraints"""
import re
from pathlib import Path
import pytest,yaml
try: import tomllib
except ImportError: import tomli as tomllib

root = Path(__file__).resolve().parent.parent
def text(name): return (root/name).read_text(encoding='utf-8')
project = tomllib.loads(text('pyproject.toml'))['project']
urls = project['urls']
version = re.search('__version__ = "(.+)"', text('fastai_runbn/__init__.py'))[1]
citation = yaml.safe_load(text('CITATION.cff'))
recipe = yaml.safe_load(text('conda/recipe.yaml'))
changes = text('CHANGELOG.md')
released = re.findall(r'^## \[(.+)\] - (.+)$', changes, re.M) # version and date, the newest first

def test_version_is_the_same_everywhere():
    in_changes,_ = released[0]
    assert {in_changes,str(citation['version']),recipe['context']['version']} == {version}

def test_date_is_the_same_in_both():
    "CITATION.cff has one from the release on"
    _,date = released[0]
    assert date=='unreleased' or re.fullmatch(r'\d{4}-\d\d-\d\d', date)
    assert str(citation.get('date-released', 'unreleased')) == date

def test_changelog_is_as_keepachangelog_has_it():
    "Sections of these names only, and a link for each version at the end"
    parts = re.findall('^### (.+)$', changes, re.M)
    assert set(parts) <= {'Added','Changed','Deprecated','Removed','Fixed','Security'}
    headings = re.findall('^## (.+)$', changes, re.M)
    assert len(headings) == len(released)
    links = [f'[{v}]: {urls["Repository"]}/releases/tag/v{v}' for v,_ in released]
    assert changes.splitlines()[-len(links):] == links

def test_citation_names_what_pyproject_does():
    author, = project['authors']
    assert citation['authors'] == [author]
    assert citation['license'] == project['license']
    assert citation['repository-code'] == urls['Repository']
    assert citation['url'] == urls['Documentation']

conda_names = dict(torch='pytorch', matplotlib='matplotlib-base')
def on_conda(requirement):
    "`pytorch >=2.4` for torch>=2.4"
    name,bound = re.fullmatch(r'([\w-]+)(>=.+)', requirement).groups()
    return f'{conda_names.get(name, name)} {bound}'

def test_conda_recipe_asks_for_what_pyproject_does():
    needs = recipe['requirements']
    assert needs['run'] == ['python', *map(on_conda, project['dependencies'])]
    system = tomllib.loads(text('pyproject.toml'))['build-system']['requires']
    assert on_conda(system[0]) in needs['host']
    scripts = [f'{k} = {v}' for k,v in project['scripts'].items()]
    assert recipe['build']['python']['entry_points'] == scripts

def test_conda_recipe_tells_what_pyproject_does():
    about = recipe['about']
    assert about['summary'] == project['description']
    assert about['license'] == project['license']
    assert [about['license_file']] == project['license-files']
    assert about['homepage'] == about['repository'] == urls['Repository']
    assert about['documentation'] == urls['Documentation']
    listed = {l.rpartition(' ')[2] for l in project['classifiers'] if 'Python :: 3.' in l}
    variants = yaml.safe_load(text('conda/variants.yaml'))['python']
    assert {v.removesuffix('.*') for v in variants} <= listed

def test_files_that_the_conda_recipe_copies_are_there():
    of_the_kernel = recipe['tests'][-1]['then']
    for f in of_the_kernel['files']['source']: assert (root/f).is_file(), f

def test_lowest_versions_are_the_bounds():
    "Each line with `==` is a bound of pyproject.toml, and each bound is there"
    lines = [l for l in text('tests/lowest.txt').splitlines() if '==' in l]
    assert [l.replace('==', '>=') for l in lines] == project['dependencies']

@pytest.mark.parametrize('name', ['CITATION.cff','CHANGELOG.md','conda/recipe.yaml'])
def test_no_address_of_the_repository_but_that(name):
    "pyproject.toml is the one place: what is here is equal to it"
    found = re.findall(r'https://github\.com/[\w.-]+/[\w.-]+', text(name))
    assert found and {f.removesuffix('.git') for f in found} == {urls['Repository']}
