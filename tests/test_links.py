"Links: of notebooks to notebooks, of README, of its copy on the package index, of Colab badges"
import json,re,subprocess,sys
from importlib.util import module_from_spec,spec_from_file_location
from pathlib import Path
import pytest
try: import tomllib
except ImportError: import tomli as tomllib

root = Path(__file__).resolve().parent.parent
urls = tomllib.loads((root/'pyproject.toml').read_text())['project']['urls']
notebooks = sorted((root/'nbs').rglob('*.ipynb'))

def links(text):
    "Targets of Markdown links and pictures; none of what stands in code"
    text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
    return re.findall(r'\]\(([^)\s]+)\)', text)

def is_local(link): return not re.match(r'\w+:|#', link)

def prose(path):
    cells = json.loads(path.read_text())['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='markdown')

@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebooks_link_to_files_that_are_there(path):
    "So a link works on GitHub and in Jupyter; `tools/docs.py` looks at the site's, with anchors"
    for link in filter(is_local, links(prose(path))):
        file = link.partition('#')[0]
        assert (path.parent/file).is_file(), link

@pytest.mark.parametrize('name', ['README.md','CONTRIBUTING.md','CHANGELOG.md'])
def test_documents_link_to_files_that_are_there(name):
    for link in filter(is_local, links((root/name).read_text())):
        assert (root/link.partition('#')[0]).is_file(), link

def absolute():
    spec = spec_from_file_location('setup_py', root/'setup.py')
    setup = module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup.absolute

@pytest.mark.parametrize('link,want', [
    ('nbs/images/a.png', '{Repository}/raw/main/nbs/images/a.png'),
    ('nbs/tutorials/how_well.ipynb#a-b', '{Documentation}/tutorials/how_well.html#a-b'),
    ('nbs/03_kernels.cpu.ipynb', '{Documentation}/kernels.cpu.html'),
    ('nbs/index.ipynb', '{Documentation}/index.html'),
    ('tests/test_state.py', '{Repository}/blob/main/tests/test_state.py'),
    ('https://arxiv.org/abs/1', 'https://arxiv.org/abs/1'), ('#use', '#use')])
def test_readme_s_links_are_made_absolute_for_the_index(link, want):
    assert absolute()(f'a [b]({link}), c', urls)==f'a [b]({want.format(**urls)}), c'

def test_no_link_of_readme_is_left_out():
    readme = (root/'README.md').read_text()
    assert any(map(is_local, links(readme)))
    assert not [*filter(is_local, links(absolute()(readme, urls)))]

def test_tutorials_open_in_colab():
    done = subprocess.run([sys.executable, root/'tools'/'colab.py', '--check'],
        capture_output=True, text=True)
    assert done.returncode==0, done.stderr

def test_workflows_do_not_name_the_repository():
    "It is named in pyproject.toml only"
    place = urls['Repository'].removeprefix('https://github.com/')
    for path in (root/'.github').rglob('*.y*ml'): assert place not in path.read_text(), path
