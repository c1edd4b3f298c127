"""``patch_match`` (OP-3) and ``patch_match_pyramid`` (OP-5): the public functions and the registration with PyTorch.

A call travels: checks here -> backend -> ``torch.ops.hdrops.patch_match`` -> autocast, vmap and autograd as registered
below -> the kernels of csrc/patch_match/. The search has no gradient; the score has one, at the match that was chosen.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hdrops import _backends
from hdrops.ops import _common
from hdrops.reference import patch_match as reference
from hdrops.reference.patch_match import PatchMatch as PatchMatch

PATCH_SIZES = (1, 3, 5, 7)
NORMALIZATIONS = ("key", "query", "both", "none")
_CAN_RUN = {
    "cpu": _backends.can_run_cpu,
    "cuda": _backends.can_run_cuda,
    "reference": _backends.can_run_reference,
}


def patch_match(
    query: Tensor,
    key: Tensor,
    *,
    radius: int | Sequence[int],
    centers: Tensor | None = None,
    patch_size: int = 3,
    normalize: str = "key",
    backend: str | None = None,
) -> PatchMatch:
    r"""Finds for every patch of ``query`` the most similar one in a window of ``key``, exactly.

    With d the places of a patch around its centre, features zero outside the grids, and c(k) the centre of site k:

    .. math::
        score(k, j) = \frac{\sum_d \langle query[k + d],\, key[j + d] \rangle}{norm}, \qquad
        index(k) = \arg\max_{|j_y - c_y(k)| \le radius_y,\; |j_x - c_x(k)| \le radius_x} score(k, j)

    The window is cut by the key's border. Of equal scores the smallest index wins; a NaN counts as minus infinity.

    Args:
        query: float [N, C, Hq, Wq]; N may be 0.
        key: [N, C, Hk, Wk], the query's dtype.
        radius: of the window, one integer or one each for height and width; >= 0.
        centers: int64 [N, Hq, Wq], linear indices y*Wk + x into the key, clamped to it; None for each site's own
            position, for which both grids must be equal.
        patch_size: 1, 3, 5 or 7.
        normalize: "key" divides by the norm of the key's patch (at least 1e-5), "query" by that of the query's, which
            does not change the match, "both" by both (cosine similarity), "none" by nothing.
        backend: "cpu", "cuda", "reference", or None for the best that runs on the query's device.

    The dtype is float64, float32, bfloat16 or float16; sums are float64 for float64 and float32 for the others. Under
    autocast query and key take the ambient dtype. No correlation volume and no unfolded patches are ever in memory.

    Returns:
        The named tuple ``PatchMatch(index, score)``: ``index`` int64 [N, Hq, Wq], linear in the key, and ``score``
        [N, Hq, Wq] in the query's dtype, minus infinity where every candidate is NaN.

    Gradients flow from ``score`` to query and key, with the match held fixed; the norm is differentiated too. A site
    whose score is not finite passes none. On the CPU results and gradients are bitwise equal for any number of
    threads. On a GPU they are from run to run, the key's gradient only under
    ``torch.use_deterministic_algorithms(True)``. Second derivatives, forward-mode AD and ``torch.func.grad`` raise;
    ``backend="reference"`` has them.

    Raises:
        ValueError: a wrong shape, value or device.
        TypeError: a wrong dtype or kind of argument.
        NotImplementedError: a backend that cannot run the call, or a derivative that the kernels do not have.

    Example:
        >>> import torch, hdrops
        >>> key = torch.rand(1, 8, 16, 16)
        >>> query = key.roll((2, -1), (2, 3))
        >>> index, score = hdrops.patch_match(query, key, radius=3, normalize="both")
        >>> divmod(index[0, 8, 8].item(), 16)
        (6, 9)

    References:
        OP-3 is the neighbourhood texture matching of APNT-Fusion (Chen et al., 2021, equations 5 and 6); patches of
        features were matched so by SRNTT (Zhang et al., CVPR 2019).
    """
    op = "patch_match"
    radius = _common.checked_pair(op, "radius", radius, 0)
    _check_shapes(query, key, centers, radius)
    check_patch_size(op, patch_size)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"{op}: normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}")
    _common.check_devices(op, "query", query, key=key, centers=centers)
    ambient = _common.autocast_dtype(query)
    if ambient is not None:
        query, key = _follow_autocast(ambient, query, key)
    _check_dtypes(query, key, centers)

    if _backends.choose(op, query, backend, _CAN_RUN) == "reference":
        with contextlib.nullcontext() if ambient is None else torch.autocast(query.device.type, enabled=False):
            return reference.patch_match(
                query, key, radius=radius, centers=centers, patch_size=patch_size, normalize=normalize
            )
    _common.refuse_functional_transforms(op, query, key)
    score, index = torch.ops.hdrops.patch_match.default(query, key, radius, centers, patch_size, normalize)
    return PatchMatch(index, score)


def patch_match_pyramid(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    *,
    radii: Sequence[int | Sequence[int]],
    patch_size: int = 3,
    normalize: str = "key",
    backend: str | None = None,
) -> list[PatchMatch]:
    """Matches coarse features over a wide window and refines the matches level by level.

    The coarsest level searches around every site's own position. Each finer one, of twice the resolution, searches
    around the match of a site's parent: ``centre(k) = 2*match(k // 2) + k - 2*(k // 2)``, clamped to the key (OP-5).

    Args:
        queries: features [N, C, H, W], coarse to fine; each level has its own C, and twice the height and width of the
            one before. Of an odd size the coarser level has half, rounded down or up.
        keys: as many, likewise; the first has the grid of the first query.
        radii: of the window of each level, an integer or a pair.
        patch_size: 1, 3, 5 or 7.
        normalize: "key", "query", "both" or "none", as for :func:`hdrops.patch_match`.
        backend: "cpu", "cuda", "reference", or None for the best that runs on the queries' device.

    Returns:
        One ``PatchMatch(index, score)`` for each level, coarse to fine, differentiable as in
        :func:`hdrops.patch_match`.

    Raises:
        ValueError: no levels, numbers of queries, keys and radii that differ, levels that do not fit each other, or
            what ``patch_match`` raises.
        TypeError: as ``patch_match``.
        NotImplementedError: as ``patch_match``.

    Example:
        >>> import torch, hdrops
        >>> fine = torch.rand(1, 8, 32, 32)
        >>> coarse = torch.nn.functional.avg_pool2d(fine, 2)
        >>> matches = hdrops.patch_match_pyramid([coarse, fine], [coarse, fine], radii=[4, 1])
        >>> [tuple(match.index.shape) for match in matches]
        [(1, 16, 16), (1, 32, 32)]
    """
    _check_levels(queries, keys, radii)
    matches: list[PatchMatch] = []
    for level, (query, key) in enumerate(zip(queries, keys, strict=True)):
        centers = None
        if matches:
            centers = reference.finer_centers(matches[-1].index, keys[level - 1], query, key)
        options: dict[str, Any] = {"patch_size": patch_size, "normalize": normalize, "backend": backend}
        matches.append(patch_match(query, key, radius=radii[level], centers=centers, **options))
    return matches


def check_patch_size(op: str, patch_size: int) -> None:
    """Raises unless the kernels know patches of that size."""
    if not _common.is_integer(patch_size) or patch_size not in PATCH_SIZES:
        sizes = ", ".join(str(size) for size in PATCH_SIZES)
        raise ValueError(f"{op}: patch_size must be one of {sizes}, got {patch_size!r}")


def check_index(op: str, name: str, index: Tensor, n: int) -> None:
    """Raises unless ``index`` is a map [N, Hq, Wq] of integers with the batch ``n``."""
    _common.check_dimensions(op, name, index, "N, Hq, Wq")
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {index.dtype}")
    if index.shape[0] != n:
        raise ValueError(f"{op}: {name} must have the batch {n}, got {index.shape[0]} ({_shape(name, index)})")


def _shape(name: str, tensor: Tensor) -> str:
    return f"{name} shape {_common.shape_of(tensor)}"


def _check_shapes(query: Tensor, key: Tensor, centers: Tensor | None, radius: tuple[int, int]) -> None:
    op = "patch_match"
    _common.check_dimensions(op, "query", query, "N, C, Hq, Wq")
    _common.check_dimensions(op, "key", key, "N, C, Hk, Wk")

    def shapes() -> str:
        return f"{_shape('query', query)}, {_shape('key', key)}"

    for axis, what in ((0, "batch"), (1, "channels")):
        if query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"{op}: key must have the query's {what} {query.shape[axis]}, got {key.shape[axis]} ({shapes()})"
            )
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[1] < 1 or tensor.shape[2] < 1 or tensor.shape[3] < 1:
            raise ValueError(
                f"{op}: {name} must have at least one channel, row and column, got shape {_common.shape_of(tensor)}"
            )
    if centers is None:
        if query.shape[2] != key.shape[2] or query.shape[3] != key.shape[3]:
            raise ValueError(f"{op}: without centers query and key must have grids of equal size, got {shapes()}")
    else:
        check_index(op, "centers", centers, query.shape[0])
        if centers.shape[1] != query.shape[2] or centers.shape[2] != query.shape[3]:
            raise ValueError(
                f"{op}: centers must have the query's size {query.shape[2]} x {query.shape[3]}, got "
                f"{centers.shape[1]} x {centers.shape[2]} ({_shape('centers', centers)})"
            )


def _check_levels(queries: Sequence[Tensor], keys: Sequence[Tensor], radii: Sequence[int | Sequence[int]]) -> None:
    """Raises unless the levels of a pyramid fit each other; :func:`patch_match` checks each of them."""
    op = "patch_match_pyramid"
    for name, given in (("queries", queries), ("keys", keys), ("radii", radii)):
        if not hasattr(given, "__len__"):
            raise TypeError(
                f"{op}: {name} must be a sequence with one entry for each level, got {type(given).__name__}"
            )
    if len(queries) == 0 or len(queries) != len(keys) or len(queries) != len(radii):
        raise ValueError(
            f"{op}: queries, keys and radii must have one entry for each of at least one level, got {len(queries)}, "
            f"{len(keys)} and {len(radii)}"
        )
    for name, features in (("queries", queries), ("keys", keys)):
        for level in range(len(features)):
            _common.check_dimensions(op, f"{name}[{level}]", features[level], "N, C, H, W")
            if level > 0:
                _check_finer_level(op, f"{name}[{level - 1}]", features[level - 1], f"{name}[{level}]", features[level])


def _check_finer_level(op: str, coarse_name: str, coarse: Tensor, fine_name: str, fine: Tensor) -> None:
    _common.check_devices(op, coarse_name, coarse, **{fine_name: fine})

    def shapes() -> str:
        return f"{_shape(coarse_name, coarse)}, {_shape(fine_name, fine)}"

    n = coarse.shape[0]
    if fine.shape[0] != n:
        raise ValueError(f"{op}: {fine_name} must have {coarse_name}'s batch {n}, got {fine.shape[0]} ({shapes()})")
    # Rows and columns beyond twice the coarser level's were cut off there; they are searched from its last. The
    # compiler cannot prove h >= 2*(h // 2) - 1 of a height it does not know, and would refuse to export.
    if torch.compiler.is_compiling():
        return
    for what, size, fine_size in zip(("height", "width"), coarse.shape[2:], fine.shape[2:], strict=True):
        if fine_size < 2 * size - 1:
            raise ValueError(
                f"{op}: levels run coarse to fine; {fine_name} must have at least the {what} 2*{size} - 1 = "
                f"{2 * size - 1}, got {fine_size} ({shapes()})"
            )


def _check_dtypes(query: Tensor, key: Tensor, centers: Tensor | None) -> None:
    if query.dtype not in _common.FLOATING_DTYPES:
        raise TypeError(f"patch_match: query must be float64, float32, bfloat16 or float16, got {query.dtype}")
    if key.dtype != query.dtype:
        raise TypeError(f"patch_match: key must have the query's dtype {query.dtype}, got {key.dtype}")


def _follow_autocast(ambient: torch.dtype, query: Tensor, key: Tensor, *others: Any) -> tuple[Any, ...]:
    return _common.cast(query, ambient), _common.cast(key, ambient), *others


def _fake(
    query: Tensor, key: Tensor, radius: Sequence[int], centers: Tensor | None, patch_size: int, normalize: str
) -> tuple[Tensor, Tensor]:
    sites = (query.shape[0], query.shape[2], query.shape[3])
    return query.new_empty(sites), query.new_empty(sites, dtype=torch.int64)


def _fake_backward(
    grad_score: Tensor,
    query: Tensor,
    key: Tensor,
    index: Tensor,
    patch_size: int,
    normalize: str,
    output_mask: Sequence[bool],
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    def like(tensor: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return tensor.new_empty(0)
        return torch.empty(
            tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=_common.memory_format(tensor)
        )

    return like(query, output_mask[0]), like(key, output_mask[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, _, _, ctx.patch_size, ctx.normalize = inputs
    ctx.save_for_backward(query, key, output[1])


def _backward(ctx: Any, grad_score: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    output_mask = list(ctx.needs_input_grad[:2])
    if grad_score is None:
        return (None,) * 6
    gradients = torch.ops.hdrops._patch_match_backward.default(
        grad_score,
        *ctx.saved_tensors,
        ctx.patch_size,
        ctx.normalize,
        output_mask,
        torch.are_deterministic_algorithms_enabled(),
    )
    return *_common.none_if_unwanted(gradients, output_mask), None, None, None, None


def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """The batch becomes part of N."""
    query, key, radius, centers, patch_size, normalize = arguments
    size = info.batch_size
    results = torch.ops.hdrops.patch_match.default(
        _common.fold_batch(query, in_dims[0], size),
        _common.fold_batch(key, in_dims[1], size),
        radius,
        None if centers is None else _common.fold_batch(centers, in_dims[3], size),
        patch_size,
        normalize,
    )
    return _common.unfold_batch(results, query, in_dims[0], size), (0, 0)


torch.library.register_fake("hdrops::patch_match", _fake)
torch.library.register_fake("hdrops::_patch_match_backward", _fake_backward)
torch.library.register_autograd("hdrops::patch_match", _backward, setup_context=_setup_context)
_common.refuse_double_backward("_patch_match_backward")
_common.register_autocast("patch_match", _follow_autocast)
torch.library.register_vmap("hdrops::patch_match", _vmap)
torch.library.register_vmap(
    "hdrops::_patch_match_backward", _common.vmap_by_loop(torch.ops.hdrops._patch_match_backward.default)
)
