"""Prefetching of memory in compiled loops.

A loop that reads places far apart in an array waits for each of them, about as long as a hundred
additions take. If they are prefetched a few rounds before, they are in the cache.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LINE = 64  # bytes of a cache line


@intrinsic
def prefetch(context: Any, array: Any, at: Any) -> Any:
    """Prefetch the cache line of array[at], without waiting; `at` may be out of bounds."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, given[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        takes = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        call = builder.module.declare_intrinsic("llvm.prefetch", [byte], takes)
        place = builder.bitcast(builder.gep(data, [given[1]]), byte)
        builder.call(call, [place, number(0), number(3), number(1)])  # to read, to keep, data
        return context.get_dummy_value()

    return types.void(array, at), generate
