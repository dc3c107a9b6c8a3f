# SPDX-License-Identifier: Apache-2.0
"""Another processor, on this one: float sums in another order, for tests that must hold wherever they run.

`HFKDQ_TEST_SUMS=3` makes every matrix product, convolution, attention, sum, mean and layer norm on the CPU take its terms
in an order drawn for that number, and a product add up two halves. As in a real library the order depends on the operation and on the
shapes and strides of what it is given and on nothing else: the same kernel gives the same numbers, and only that may be relied upon.
"""

from __future__ import annotations

import functools
import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "HFKDQ_TEST_SUMS"
HERE = str(Path(__file__).parent)
_libraries: list[Any] = []


def from_environment() -> None:
    """Switches it on, here and in every Python started from here, if the variable names a number."""
    if not os.environ.get(VARIABLE):
        return
    rest = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if HERE not in rest:  # where `sitecustomize` lies
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, *rest]))
    if not _libraries:
        switch_on(int(os.environ[VARIABLE]))


def switch_on(seed: int) -> None:
    """Replaces the kernels of the CPU in this process, for good."""
    import numpy as np
    import torch

    library = torch.library.Library("aten", "IMPL", "CPU")
    _libraries.append(library)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    @functools.cache
    def drawn(key: str, length: int) -> Any:
        return np.random.RandomState(zlib.crc32(f"{seed} {key}".encode())).permutation(length)

    def order(name: str, length: int, *tensors: Any) -> Any:
        # Made anew, as tests count the tensors that are left.
        return torch.from_numpy(drawn(f"{name} {[(t.shape, t.stride(), t.dtype) for t in tensors]}", length))

    def summed(*tensors: Any) -> bool:
        """Only floating point has an order."""
        return all(t.is_floating_point() and t.numel() for t in tensors)

    def replaces(name: str) -> Callable[[Callable[..., Any]], None]:
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

        def register(function: Callable[..., Any]) -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning only once for all operators")  # it says what we mean to do
                library.impl(name, functools.partial(function, functools.partial(kernel.call_boxed, keys)))

        return register

    def halves(terms: Any, axis: int) -> list[Any]:
        return list(terms.tensor_split(2, axis)) if terms.shape[axis] > 1 else [terms]

    for batched in (False, True):
        axis = int(batched)
        product, added = ("bmm", "baddbmm") if batched else ("mm", "addmm")

        def multiply(original, a, b, axis=axis, name=product):
            if not summed(a, b):
                return original(a, b)
            p = order(name, a.shape[-1], a, b)
            left, right = halves(a.index_select(axis + 1, p), axis + 1), halves(b.index_select(axis, p), axis)
            results = [original(x.contiguous(), y.contiguous()) for x, y in zip(left, right, strict=True)]
            return functools.reduce(torch.add, results)

        def multiply_and_add(original, c, a, b, *, beta=1, alpha=1, axis=axis, name=added):
            if not summed(a, b):
                return original(c, a, b, beta=beta, alpha=alpha)
            p = order(name, a.shape[-1], c, a, b)
            left, right = halves(a.index_select(axis + 1, p), axis + 1), halves(b.index_select(axis, p), axis)
            for x, y in zip(left, right, strict=True):
                c, beta = original(c, x.contiguous(), y.contiguous(), beta=beta, alpha=alpha), 1
            return c

        def into(of, inner):
            """The same for `out=`, which compiled programs call."""

            def function(original, *args, out, **kwargs):
                if not summed(*args):
                    return original(*args, **kwargs, out=out)
                result = of(inner, *args, **kwargs)
                return out.resize_(result.shape).copy_(result)

            return function

        inner = [torch.library.get_kernel(f"aten::{name}", "CPU") for name in (product, added)]
        inner = [functools.partial(kernel.call_boxed, keys) for kernel in inner]
        replaces(product)(multiply)
        replaces(added)(multiply_and_add)
        replaces(f"{product}.out")(into(multiply, inner[0]))
        replaces(f"{added}.out")(into(multiply_and_add, inner[1]))

    @replaces("dot")
    def _(original, a, b):
        if not summed(a, b):
            return original(a, b)
        p = order("dot", len(a), a, b)
        return original(a[p], b[p])

    @replaces("addmv")
    def _(original, c, a, b, *, beta=1, alpha=1):
        if not summed(a, b):
            return original(c, a, b, beta=beta, alpha=alpha)
        p = order("addmv", len(b), a, b)
        return original(c, a.index_select(1, p), b[p], beta=beta, alpha=alpha)

    def reduced(name):
        def function(original, x, dim=None, *args, **kwargs):
            if x.ndim and summed(x):
                axis = max([d % x.ndim for d in dim] if dim else range(x.ndim), key=lambda d: x.shape[d])
                x = x.index_select(axis, order(f"{name} {dim}", x.shape[axis], x))
            return original(x, dim, *args, **kwargs)

        return function

    replaces("sum.dim_IntList")(reduced("sum"))
    replaces("mean.dim")(reduced("mean"))

    @replaces("native_layer_norm")
    def _(original, x, shape, weight, bias, eps):
        if len(shape) != 1 or not summed(x):
            return original(x, shape, weight, bias, eps)
        p = order("layer_norm", shape[0], x)
        parts = [None if t is None else t[p] for t in (weight, bias)]
        out, *moments = original(x.index_select(-1, p), shape, *parts, eps)
        return out.index_select(-1, p.argsort()), *moments

    def unmasked(x, p, axis):
        return None if x is None else x.index_select(axis, p) if x.shape[axis] == len(p) else x

    @replaces("_scaled_dot_product_flash_attention_for_cpu")
    def _(original, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        p = order("attention", q.shape[-1], q, k, v)
        q, k = q.index_select(-1, p), k.index_select(-1, p)
        if not is_causal:
            p = order("attention values", k.shape[-2], q, k, v)
            k, v, attn_mask = k.index_select(-2, p), v.index_select(-2, p), unmasked(attn_mask, p, -1)
        return original(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)

    @replaces("_scaled_dot_product_flash_attention_for_cpu_backward")
    def _(original, grad, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
        p = order("attention", q.shape[-1], q, k, v)
        q, k = q.index_select(-1, p), k.index_select(-1, p)
        dq, dk, dv = original(grad, q, k, v, out, lse, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        return (*(None if t is None else t.index_select(-1, p.argsort()) for t in (dq, dk)), dv)

    @replaces("_convolution")  # which `convolution` calls, and which is what `torch.jit.trace` sees
    def _(original, x, w, bias, stride, padding, dilation, transposed, output_padding, groups, *flags):
        rest = (bias, stride, padding, dilation, transposed, output_padding, groups, *flags)
        if transposed or not summed(x, w) or x.ndim != w.ndim or x.shape[1] != w.shape[1] * groups:  # which it refuses
            return original(x, w, *rest)
        p = order(f"convolution {rest[1:]}", w.shape[1], x, w)
        x = x.index_select(1, torch.cat([p + group * len(p) for group in range(groups)]))
        w = w.index_select(1, p)
        turned = list(range(2, x.ndim))
        stride, padding, dilation = (
            list(v) * (len(turned) // len(v)) for v in (stride, padding, dilation)
        )  # one for all
        sizes = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
        if any((n + 2 * pad - d * (k - 1) - 1) % s for n, k, s, pad, d in sizes):
            turned = []  # the last places would not be the same
        return original(x.flip(turned), w.flip(turned), *rest).flip(turned)

    @replaces("convolution_backward")
    def _(original, grad, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask):
        rest = (bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask)
        if transposed or not summed(grad, x, w):
            return original(grad, x, w, *rest)
        rows = order(f"convolution_backward rows {rest}", len(x), x, w)
        p = order(f"convolution_backward {rest}", len(w) // groups, x, w)
        channels = torch.cat([p + group * len(p) for group in range(groups)])
        grad = grad.index_select(0, rows).index_select(1, channels)
        dx, dw, db = original(grad, x.index_select(0, rows), w.index_select(0, channels), *rest)
        back = channels.argsort()
        return (
            None if dx is None else dx.index_select(0, rows.argsort()),
            None if dw is None else dw.index_select(0, back),
            None if db is None else db.index_select(0, back),
        )
