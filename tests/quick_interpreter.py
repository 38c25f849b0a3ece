"""Triton's interpreter without the work that it repeats: results stay, launches take half the time.

On every launch, and again on every call of one @triton.jit function by another, it lists all of triton.language to put
interpreted functions in place of the built-in ones. What is built in does not change, and what a launch has replaced
stays so until it ends.
"""

from __future__ import annotations

import inspect
from functools import cache

import triton.language as tl
from triton.runtime import interpreter


def make_quick() -> None:
    """In this process, for good."""
    patch_language = interpreter._patch_lang
    replaced: set[int] = set()

    @cache
    def builtins(module):
        return [name for name, member in inspect.getmembers(module) if tl.core.is_builtin(member)]

    def patch_builtins(module, builder, scope):
        for name in builtins(module):
            if tl.core.is_builtin(getattr(module, name)):
                interpreter._patch_attr(module, name, getattr(module, name), builder, scope)

    def patch_once(fn):
        """None for a call within a launch from a file whose names are replaced already."""
        if id(fn.__globals__) in replaced:
            return None
        scope, is_launch = patch_language(fn), not replaced
        replaced.add(id(fn.__globals__))
        if is_launch:
            restore = scope.restore

            def forget_and_restore():
                replaced.clear()
                restore()

            scope.restore = forget_and_restore
        return scope

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtins, patch_once
