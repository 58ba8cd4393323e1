"""Rigid transformations and dihedral angles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

EPSILON = 1e-8


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
        return _rotate(self.rot, x) + self.trans

    def invert_apply(self, x: Tensor) -> Tensor:
        """Global to local coordinates, ``[..., 3]``."""
        return _rotate(self.rot.mT, x - self.trans)

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
        local_origin = _rotate(self.rot.mT, self.trans)
        return rotated.unflatten(-1, (frames, 3)).transpose(1, 2) - local_origin[:, :, None]

    def unsqueeze(self) -> Rigid:
        """The same frames with a new last leading axis, to apply each to many points."""
        return Rigid(self.rot.unsqueeze(-3), self.trans.unsqueeze(-2))

    def detach_rotation(self) -> Rigid:
        """The same frames with no gradient through the rotations (AF2 Algorithm 20, line 20)."""
        return Rigid(self.rot.detach(), self.trans)


def _rotate(rot: Tensor, x: Tensor) -> Tensor:
    """Product of ``[..., 3, 3]`` and ``[..., 3]``; elementwise, since batched 3 x 3 products are slow on a GPU."""
    return (rot * x[..., None, :]).sum(-1)


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
