"""Imports point down the list of rooms, ComfyUI stays in nodes/, and the root imports nothing."""

import ast
import re
import subprocess
import sys

import difflora_core

FLOORS = (
    ("errors", "limits"),
    ("config", "comfy_client"),
    ("lora", "vision", "text", "diffusion"),
    ("base_model", "models", "adapters"),
    ("methods",),
    ("storage",),
    ("data",),
    ("training", "evaluation"),
    ("demo",),
    ("commands",),
)
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
DEMO_FLOORS = (
    ("paths",),
    ("world", "comfyui"),
    ("networks", "examples"),
    ("build", "workflows"),
)
TOP = ("demo", "build")
"""A folder above all rooms, the commands too: it calls them, as a user does."""
DEMO_LEVELS = {room: level for level, rooms in enumerate(DEMO_FLOORS) for room in rooms}
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "execution", "folder_paths"}
HEAVY = {
    "accelerate",
    "diffusers",
    "insightface",
    "onnxruntime",
    "peft",
    "transformers",
}
SHARED_NODE_FILES = {
    *("sockets", "model_paths", "host"),
}


def allowed(importer: str, imported: str) -> bool:
    """The house's import law for two rooms."""
    return importer == imported or LEVELS[imported] < LEVELS[importer]


def test_rooms_are_known(sources):
    rooms = {source.room for source in sources if source.in_core}
    assert rooms <= {*LEVELS, "__init__", "__main__"}


def test_imports_point_down(sources):
    wrong = []
    for source in sources:
        if not source.in_core or source.room not in LEVELS or source.path.parts[1:3] == TOP:
            continue
        for line, target in source.imports():
            parts = target.split(".")
            if parts[0] == "difflora_core" and len(parts) > 1 and parts[1] in LEVELS:
                if not allowed(source.room, parts[1]) or tuple(parts[1:3]) == TOP:
                    wrong.append(f"{source.path}:{line} {source.room} -> {parts[1]}")
    assert not wrong


def test_imports_point_down_inside_the_demo(sources):
    wrong = []
    for source in sources:
        room = source.path.with_suffix("").parts[2:3] if source.room == "demo" else ()
        for line, target in source.imports() if room and room[0] in DEMO_LEVELS else []:
            other = target.removeprefix("difflora_core.demo.").split(".")[0]
            if target.startswith("difflora_core.demo.") and other in DEMO_LEVELS:
                if other not in room and DEMO_LEVELS[other] >= DEMO_LEVELS[room[0]]:
                    wrong.append(f"{source.path}:{line} {room[0]} -> {other}")
    assert not wrong


def test_no_file_imports_itself_through_others(sources):
    """Circles, those of type checkers too; inside one package they count as well."""
    files = {".".join(s.path.with_suffix("").parts): s for s in sources}
    edges = {
        name: {
            module
            for _, target in source.imports()
            for module in (target, target.rpartition(".")[0])
            if module in files and module != name
        }
        for name, source in files.items()
    }
    left = dict(edges)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    circular = [
        name for name in left if any(name in edges.get(target, ()) for target in edges[name])
    ]
    assert not left, circular or sorted(left)


def test_the_map_of_the_rooms_is_the_plan(root):
    """What difflora_core/__init__.py lists, from the ground up, are the floors and the folders."""
    listed = re.findall(r"^- ``(\w+)``", difflora_core.__doc__, re.MULTILINE)
    assert listed == sorted(listed, key=LEVELS.__getitem__)
    paths = [p for p in (root / "difflora_core").iterdir() if p.name[:2] != "__"]
    assert sorted(listed) == sorted(LEVELS) == sorted(p.stem for p in paths)


def test_core_never_imports_the_host(sources):
    wrong = [
        f"{source.path}:{line} {target}"
        for source in sources
        if source.in_core
        for line, target in source.imports()
        if target.split(".")[0] in {*HOST, "nodes"}
    ]
    assert not wrong


def test_imports_of_ours_are_relative(sources):
    """ComfyUI loads the pack under a path-shaped name: an absolute import finds nothing there."""
    wrong = [
        f"{source.path}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Import) and any(ours(alias.name) for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and not node.level and ours(node.module or ""))
    ]
    assert not wrong


def ours(module: str) -> bool:
    """True for a module of this pack by its absolute name."""
    return module.split(".")[0] in ("difflora_core", "nodes")


def test_nodes_share_only_the_host(sources):
    wrong = [
        f"{source.path}:{line} {target}"
        for source in sources
        if not source.in_core and source.path.name != "__init__.py"
        for line, target in source.imports()
        if target.startswith("nodes.") and target.split(".")[1] not in SHARED_NODE_FILES
    ]
    assert not wrong


def test_root_imports_nothing_of_ours_at_module_level(root):
    """pytest imports the root as a package, and ComfyUI is not there then."""
    tree = ast.parse((root / "__init__.py").read_text("utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [
        n.module or "." if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports
    ]
    assert not any(getattr(node, "level", 0) for node in imports)
    assert set(modules) <= set(sys.stdlib_module_names)


def test_nodes_import_nothing_heavy(sources, root):
    """ComfyUI's start waits for our imports; what only training or a first run needs can wait."""
    modules = {
        target.rpartition(".")[0]
        for source in sources
        if not source.in_core
        for _, target in source.imports()
        if target.startswith("difflora_core.")
    }
    program = f"import sys, {', '.join(sorted(modules))}\nsys.stdout.write(' '.join(sys.modules))"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert not HEAVY & set(loaded.split())
