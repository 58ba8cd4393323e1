"""Rigid transformations and dihedral angles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

EPSILON = 1e-8
_SQUARINGS = 14


def normalize(x: Tensor) -> Tensor:
    """Unit vectors along the last axis; a zero vector stays zero and has a finite gradient."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


@dataclass(frozen=True)
class Rigid:
    """Rotation followed by translation, ``x -> rot @ x + trans``.

    Attributes
    ----------
    rot : Tensor
        ``[..., 3, 3]`` rotation matrices.
    trans : Tensor
        ``[..., 3]`` translations.
    """

    rot: Tensor
    trans: Tensor

    @classmethod
    def identity(cls, shape: tuple[int, ...], device: torch.device) -> Self:
        """Identity transformations with leading axes ``shape``, fp32."""
        rot = torch.eye(3, device=device).expand(*shape, 3, 3)
        return cls(rot, torch.zeros(*shape, 3, device=device))

    @classmethod
    def from_axes(cls, origin: Tensor, along: Tensor, side: Tensor) -> Self:
        """Frame with the x axis along ``along`` and ``side`` in the upper xy half plane (AF2 Algorithm 21).

        Parameters
        ----------
        origin, along, side : Tensor
            ``[..., 3]``: a point and two directions that are not parallel.
        """
        e1 = normalize(along)
        e2 = normalize(side - (e1 * side).sum(-1, keepdim=True) * e1)
        e3 = torch.linalg.cross(e1, e2)
        return cls(torch.stack([e1, e2, e3], dim=-1), origin)

    @classmethod
    def from_backbone(cls, n: Tensor, ca: Tensor, c: Tensor) -> Self:
        """Residue frame: origin at CA, x axis towards C, N in the xy plane; coordinates ``[..., 3]``."""
        return cls.from_axes(ca, c - ca, n - ca)

    def compose(self, other: Rigid) -> Rigid:
        """First ``other``, then ``self``."""
        return Rigid(self.rot @ other.rot, self.apply(other.trans))

    def apply(self, x: Tensor) -> Tensor:
        """Local to global coordinates, ``[..., 3]``."""
        return rotate(self.rot, x) + self.trans

    def invert_apply(self, x: Tensor) -> Tensor:
        """Global to local coordinates, ``[..., 3]``."""
        return rotate(self.rot.mT, x - self.trans)

    def see(self, x: Tensor) -> Tensor:
        """Local coordinates of every point in every frame, by one matrix product.

        Parameters
        ----------
        x : Tensor
            ``[B, M, 3]`` points; the frames are ``[B, N]``.

        Returns
        -------
        Tensor
            ``[B, N, M, 3]``.
        """
        batch, frames = self.trans.shape[:2]
        rotated = x @ self.rot.permute(0, 2, 1, 3).reshape(batch, 3, 3 * frames)
        local_origin = rotate(self.rot.mT, self.trans)
        return rotated.unflatten(-1, (frames, 3)).transpose(1, 2) - local_origin[:, :, None]

    def unsqueeze(self) -> Rigid:
        """The same frames with a new last leading axis, to apply each to many points."""
        return Rigid(self.rot.unsqueeze(-3), self.trans.unsqueeze(-2))

    def detach_rotation(self) -> Rigid:
        """The same frames with no gradient through the rotations (AF2 Algorithm 20, line 20)."""
        return Rigid(self.rot.detach(), self.trans)


def rotate(rot: Tensor, x: Tensor) -> Tensor:
    """Product of ``[..., 3, 3]`` and ``[..., 3]``; elementwise, since batched 3 x 3 products are slow on a GPU."""
    return (rot * x[..., None, :]).sum(-1)


def rotation_of(quaternion: Tensor) -> Tensor:
    """Rotation matrices ``[..., 3, 3]`` of unit quaternions (w, x, y, z) ``[..., 4]``."""
    w, x, y, z = quaternion.unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def superposing_rotation(x: Tensor, target: Tensor) -> Tensor:
    """Rotation that brings points nearest to others (Horn 1987), by matrix products alone, as a CUDA graph needs it.

    Parameters
    ----------
    x, target : Tensor
        ``[B, N, 3]`` matched points about their centres; points of zero do not count.

    Returns
    -------
    Tensor
        ``[B, 3, 3]``, proper.
    """
    xx, xy, xz, yx, yy, yz, zx, zy, zz = (x[..., :, None] * target[..., None, :]).sum(-3).flatten(-2).unbind(-1)
    rows = [
        xx + yy + zz, yz - zy, zx - xz, xy - yx,
        yz - zy, xx - yy - zz, xy + yx, zx + xz,
        zx - xz, xy + yx, yy - xx - zz, yz + zy,
        xy - yx, zx + xz, yz + zy, zz - xx - yy,
    ]  # fmt: skip
    matrix = torch.stack(rows, dim=-1).unflatten(-1, (4, 4))
    # The eigenvector of the largest eigenvalue, which all others fall behind in powers of the shifted matrix.
    size = matrix.norm(dim=(-2, -1), keepdim=True) + EPSILON
    power = matrix / size + torch.eye(4, device=x.device, dtype=x.dtype)
    for _ in range(_SQUARINGS):
        power = power @ power
        power = power / power.norm(dim=(-2, -1), keepdim=True)
    best = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    column = power.gather(-1, best[..., None, None].expand(*best.shape, 4, 1)).squeeze(-1)
    return rotation_of(column / column.norm(dim=-1, keepdim=True))


def distances(x: Tensor) -> Tensor:
    """All distances between points, ``[..., N, 3]`` to ``[..., N, N]``, without the rounding of a matrix product."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def turned(v: Tensor, axis: Tensor, angle: Tensor) -> Tensor:
    """Vectors ``[*, 3]`` turned about unit axes by angles ``[*, 1]`` in radians (Rodrigues)."""
    across = torch.linalg.cross(axis, v)
    along = axis * (axis * v).sum(-1, keepdim=True)
    return v * angle.cos() + across * angle.sin() + along * (1 - angle.cos())


def dihedral(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Sine and cosine of the dihedral angle a-b-c-d.

    Parameters
    ----------
    a, b, c, d : Tensor
        ``[..., 3]`` points; 0 is cis, positive is clockwise seen from b to c.

    Returns
    -------
    Tensor
        ``[..., 2]``.
    """
    frame = Rigid.from_axes(c, c - b, a - c)
    local = frame.invert_apply(d)
    return normalize(torch.stack([local[..., 2], local[..., 1]], dim=-1))
