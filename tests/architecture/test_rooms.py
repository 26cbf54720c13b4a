"""Methods have the same stem in every room, budgets hold, and requirements are told once."""

import ast

import pytest
import tomllib

from difflora_core import __version__

MAX_FILE, MAX_FUNCTION, MAX_FIT, MAX_PARAMETERS = 400, 50, 120, 7
EXCUSE = "# over budget:"  # followed by the reason, in the file
SEEDING = {
    "torch.manual_seed",
    "torch.seed",
    "torch.random.manual_seed",
    "torch.random.fork_rng",  # what is seeded inside is seeded globally
    "torch.random.default_generator.manual_seed",
    "torch.default_generator.manual_seed",
    "np.random.seed",
    "numpy.random.seed",
    "random.seed",
}
FORBIDDEN_CALLS = {"print", "eval", "exec", "torch.save", *SEEDING}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "manager"}


def functions(source):
    """Every function of a file."""
    return [
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_method_has_the_same_stem_in_every_room(root):
    stems = {path.stem for path in (root / "difflora_core" / "methods").glob("*.py")}
    missing = []
    for stem in sorted(stems - {"__init__", "base", "registry"}):
        rooms = ("difflora_core/adapters", "difflora_core/training", "nodes")
        missing += [
            f"{room}/{stem}"
            for room in rooms
            if not (root / room / f"{stem}.py").exists() and not (root / room / stem).is_dir()
        ]
    assert not missing


def test_files_keep_their_budget(sources, beside):
    files = [*sources, *beside]
    lengths = {str(s.path): s.text.count("\n") for s in files if EXCUSE not in s.text}
    assert {path: n for path, n in lengths.items() if n > MAX_FILE} == {}


def test_functions_keep_their_budget(sources, beside):
    long = []
    for source in [*sources, *beside]:
        if EXCUSE in source.text:
            continue
        for node in functions(source):
            length = node.end_lineno - node.lineno + 1
            if length > (MAX_FIT if node.name == "fit" else MAX_FUNCTION):
                long.append(f"{source.path}:{node.lineno} {node.name}: {length} lines")
    assert not long


def test_core_functions_take_few_parameters(sources):
    many = []
    for source in sources:
        if not source.in_core or EXCUSE in source.text:
            continue
        for node in functions(source):
            names = [a.arg for a in [*node.args.args, *node.args.kwonlyargs]]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                many.append(f"{source.path}:{node.lineno} {node.name}: {count}")
    assert not many


def test_no_smells(sources):
    smells = []
    for source in sources:
        for node in ast.walk(source.tree):
            at = f"{source.path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
                smells.append(f"{at} {ast.unparse(node.func)}")
            elif isinstance(node, ast.Assert):
                smells.append(f"{at} assert")
            elif isinstance(node, ast.ExceptHandler) and node.type is None:
                smells.append(f"{at} bare except")
        smells += [f"{at} imports {t}" for at, t in source.imports() if t.split(".")[0] == "pickle"]
    assert not smells


def test_tests_seed_no_global_state(root):
    """What is random in a test comes from a generator of its own."""
    seeded = []
    for path in sorted((root / "tests").glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in SEEDING:
                seeded.append(f"{path.relative_to(root)}:{node.lineno}")
    assert not seeded


HOMES = {
    "safetensors": {"difflora_core/storage/safetensors_io.py"},
    "json.load": {
        "difflora_core/config.py",  # parse_json
        "difflora_core/lora/layout.py",  # a cache key that it made itself
        "difflora_core/training/state_file.py",  # its own record, as it will be read
        "difflora_core/comfy_client.py",  # answers of the server that it started
    },
    "load_torch_file": {"nodes/loaders.py"},  # LoRA pickles, as ComfyUI reads them
    "torch.load": {"difflora_core/storage/torch_file.py"},  # `convert` reads tensors alone
    "write_text": {"difflora_core/storage/atomic.py"},
}
"""What opens files, and the only product files where it stands."""


def test_files_are_opened_in_one_place(sources):
    """No second reader of safetensors or JSON, and no writer beside the atomic one."""
    names = {
        **dict.fromkeys(("safe_open", "load_file", "save_file"), "safetensors"),
        **dict.fromkeys(("json.load", "json.loads"), "json.load"),
        "load_torch_file": "load_torch_file",
        "torch.load": "torch.load",
        **dict.fromkeys((".write_text", ".write_bytes"), "write_text"),
    }
    wrong = []
    for source in sources:
        for node in ast.walk(source.tree):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            for name, home in names.items():
                found = call == name or (call.endswith(name) and name[0] in ".l")
                if found and name == "torch.load":
                    options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert options.get("weights_only") == "True"
                found = found and not call.startswith("temporary.")  # in a block of `replacing`
                if found and str(source.path) not in HOMES[home]:
                    wrong.append(f"{source.path}:{node.lineno} {call}")
    assert not wrong


def test_files_are_named_after_their_subject(sources):
    assert not [str(s.path) for s in sources if s.path.stem in FORBIDDEN_NAMES]


def public(body):
    """The public classes and functions defined directly in a body."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def test_public_names_have_docstrings(sources):
    bare = [str(s.path) for s in sources if s.text.strip() and not ast.get_docstring(s.tree)]
    for source in sources:
        for node in public(source.tree.body) if source.in_core else []:
            members = public(node.body) if isinstance(node, ast.ClassDef) else []
            bare += [
                f"{source.path}:{n.lineno} {n.name}"
                for n in [node, *members]
                if not ast.get_docstring(n)
            ]
    assert not bare


def test_the_oldest_python_is_told_once(sources, root):
    """ComfyUI runs on Python 3.10 too; types and style are checked as that one sees them."""
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    assert settings["project"]["requires-python"] == ">=3.10"
    assert settings["tool"]["mypy"]["python_version"] == "3.10"
    assert settings["tool"]["ruff"]["target-version"] == "py310"
    assert settings["project"]["version"] == __version__
    assert not [s.path for s in sources for _, t in s.imports() if t.split(".")[0] == "tomllib"]


def test_requirements_are_told_once(root):
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (root / "requirements.txt").read_text("utf-8").split("\n")
    assert [line for line in lines if line and not line.startswith("#")] == project["dependencies"]


@pytest.mark.parametrize("name", ["torch", "torchvision", "torchaudio", "numpy", "opencv", "comfy"])
def test_requirements_leave_the_host_alone(root, name):
    lines = (root / "requirements.txt").read_text("utf-8").lower().split("\n")
    assert not [line for line in lines if line.split(">")[0].split("=")[0] == name]
    assert not [line for line in lines if line.startswith(("opencv-", "onnxruntime-"))]


def test_make_targets_stay_short(root):
    """The Makefile is a table of contents: at most five lines each."""
    length = 0
    for line in (root / "Makefile").read_text("utf-8").split("\n"):
        length = length + 1 if line.startswith("\t") else 0
        assert length <= 5, line
