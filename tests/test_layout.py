"""Facts about the tree that nothing else would notice."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_source_root_is_no_package():
    """With ssl/__init__.py, `import ssl` at the root would find this folder instead of Python's
    TLS module; an import check would not notice, as pytest puts the root last."""
    assert not (ROOT / "ssl" / "__init__.py").exists()


def test_python_at_the_root_finds_its_own_ssl_module():
    import sys

    code = "import ssl, asyncio; assert hasattr(ssl, 'SSLContext'), ssl"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_their_homes_name_hydra_and_wandb():
    homes = {"hydra": {"build.py"}, "wandb": {"wandb.py"}}
    for path in (ROOT / "ssl").rglob("*.py"):
        text = path.read_text()
        for module, allowed in homes.items():
            imports = re.search(rf"^\s*(import|from) {module}\b", text, re.MULTILINE)
            assert not imports or path.name in allowed, f"{path} imports {module}"


def test_no_file_is_too_long_to_read():
    files = [*ROOT.glob("ssl/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    long = {
        str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > 450
    }
    assert not long, long
