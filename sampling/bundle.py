"""Puts the sources that a class needs into one file, for who loads it without this repository.

text = bundle("moe.py", "models.py", ("sampling/diffusers_pipeline.py", "DiTMoETransformer"))
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN = (
    "models", "moe", "routers", "moe_kernels", "diffusion", "runtime", "latents", "checkpoints",
    "sampling",
)  # fmt: skip


def bundle(*parts: str | tuple[str, ...]) -> str:
    """Joins modules, each a path from the repository's root, or (path, names of what is taken).

    Imports between them go, all others come first. Raises ValueError when two define one name.
    """
    imports: dict[str, None] = {}
    definitions: list[str] = []
    seen: dict[str, str] = {}
    for part in parts:
        path, *names = (part,) if isinstance(part, str) else part
        source = (ROOT / path).read_text()
        tree = ast.parse(source)
        definitions.append(f"# {path}\n")
        for number, node in enumerate(tree.body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not is_own(node):
                    imports[segment(source, node)] = None
                continue
            defined = names_of(node)
            is_docstring = number == 0 and isinstance(node, ast.Expr)
            if is_docstring or defined == ["__all__"] or (names and not set(defined) & set(names)):
                continue
            for name in defined:
                if name in seen:
                    raise ValueError(f"{name}: defined in {seen[name]} and in {path}")
                if name != "_":
                    seen[name] = path
            definitions.append(segment(source, node) + "\n")
    return "\n".join([*imports, "", *definitions])


def is_own(node: ast.Import | ast.ImportFrom) -> bool:
    modules = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    return all(module.split(".")[0] in OWN for module in modules)


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def segment(source: str, node: ast.stmt) -> str:
    """The text of a statement, decorators included."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])
