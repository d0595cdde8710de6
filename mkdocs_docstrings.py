"""Prepares docstrings for the API reference: an extension of Griffe.

* A settings class states the help of a field in a call, `epochs: int = setting("...", 30)`. It is
  copied to the place where Griffe looks for it, the `Attributes` of the docstring.
* Doctests become code blocks.
"""

import ast
import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)


class DocstringsExtension(griffe.Extension):
    """Adds the fields made by `setting` to the docstring of their class, and fences doctests."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Fences the doctests of any docstring."""
        if obj.docstring:
            obj.docstring.value = _DOCTEST.sub(
                lambda found: f"```pycon\n{found[0].strip()}\n```\n", obj.docstring.value
            )

    def on_class_members(self, *, node: Any, cls: griffe.Class, **kwargs: Any) -> None:
        """Adds the fields when the members of a class are known."""
        fields = [
            _describe(each.target.id, each.annotation, each.value)
            for each in getattr(node, "body", [])
            if isinstance(each, ast.AnnAssign)
            and isinstance(each.value, ast.Call)
            and ast.unparse(each.value.func) == "setting"
        ]
        if fields:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(fields)


def _describe(name, annotation, call):
    """A field as a line of a Google-style section."""
    arguments = dict(zip(("help", "default"), call.args))
    arguments |= {each.arg: each.value for each in call.keywords}
    text = _text(arguments["help"])
    default = ast.unparse(arguments.get("default", ast.Constant(None)))
    if default != "None":
        text += f" Default: `{default}`."
    return f"    {name} ({ast.unparse(annotation)}): {text}"


def _text(string):
    """The literal parts of a string, with an ellipsis in place of each part that is computed."""
    if isinstance(string, ast.JoinedStr):
        return "".join(map(_text, string.values))
    if isinstance(string, ast.BinOp):
        return _text(string.left) + _text(string.right)
    return string.value if isinstance(string, ast.Constant) else "..."
