"""Puts MetaMask among solo-learn's methods once solo-learn is imported, and not before.

Importing solo-learn takes seconds, so importing this package must not do it.
"""

import importlib
import sys
from types import ModuleType

from wrapt import when_imported

METHOD = "metamask_solo.method.metamask"
HOSTS = "metamask_solo.hosts"


def register_when_imported() -> None:
    """Arranges that :mod:`metamask_solo.method.metamask` follows ``solo``, whoever imports that."""
    when_imported(HOSTS)(_import_method)
    # not of solo.methods: the package imports it before other parts that the method needs
    when_imported("solo")(_unless_hosts_follow)


def _unless_hosts_follow(module: ModuleType) -> None:
    # imported by our own hosts, which are not complete yet: their hook follows
    if HOSTS not in sys.modules:
        _import_method(module)


def _import_method(module: ModuleType) -> None:
    importlib.import_module(METHOD)
