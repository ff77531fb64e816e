"""Docstrings name other objects by Sphinx roles, which Markdown does not know: show the names alone."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=`)")


class PlainRoles(griffe.Extension):
    """Turn :class:`Name` into `Name` in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub("", obj.docstring.value)
