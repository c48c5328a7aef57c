"""Every operator that graphs may call, each in one place: what it means, what is checked of it, what it becomes.

Importing this package registers the ``lbllm::*`` operators with torch and everything with :mod:`.registry`. The
``lbllm`` ones are in :mod:`.lbllm`, one module for those that belong together; what of torch's ``aten`` operators a
program can hold is in :mod:`.aten`.
"""

from . import aten, lbllm, stored
from .arguments import Arguments, first_argument, set_argument
from .registry import Operator, define, find, operators, register

__all__ = [
    "Arguments",
    "Operator",
    "aten",
    "define",
    "find",
    "lbllm",
    "operators",
    "register",
    "first_argument",
    "set_argument",
    "stored",
]
