"""The house: which file may import which."""

import ast

from conftest import ROOT

ALLOWED = {  # everything else imports nothing of ours outside its own folder
    "prepare": {"plumbing"},
    "train": {"model", "flow", "plumbing", "report"},
    "sample": {"model", "flow", "plumbing", "report"},
    "report": {"model", "plumbing"},
}


def test_imports_point_down():
    rooms = {path.stem for path in ROOT.glob("*.py")} | {"plumbing", "report"}
    assert rooms == {"prepare", "model", "flow", "train", "sample", "plumbing", "report"}
    paths = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("report/*.py")]
    for path in paths:
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            imported = {name.split(".")[0] for name in names} & rooms - {room}
            assert imported <= ALLOWED.get(room, set()), f"{path} imports {imported}"
