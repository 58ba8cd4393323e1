"""Antibody pairs derived from known ones, for a teacher to predict: new pairings, exchanged CDRs, point mutations.

Frameworks and CDRs stay natural as a whole, so that a teacher is asked about sequences like those it knows; what is new
is their combination. Exchanged CDRs come from a domain of the same kind (heavy, kappa, lambda), CDR 1 and 2 of the same
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from Bio.Align import substitution_matrices
from pydantic import Field

from pairformer_fast.config import Frozen
from pairformer_fast.inference.antibody import best_hit, check_variable_domain
from pairformer_fast.model.residue import RESTYPES
from pairformer_fast.training.leakage import HeavyChain, HeldOut, annotated_chain
from pairformer_fast.training.sources import Pair

DERIVED_SOURCE = "derived"

CONSERVED = "CW"
"""Residues that hold the fold together: never mutated, never introduced."""

CDRS = (1, 3, 5)
"""Places of CDR 1 to 3 among the seven regions of a domain, from FR1 to FR4."""

MOST_DRAWS = 20
"""Draws for each pair wanted, before it is given up."""


class Derivation(Frozen):
    """How many pairs to derive, and how.

    Attributes
    ----------
    count : int
        Pairs that pass all checks.
    graft : float
        Probability that a CDR is taken from another domain.
    mutations : float
        Mean number of point mutations of a domain, by BLOSUM62.
    cdr_mutations : float
        Chance of a CDR residue to be mutated, in units of that of a framework residue.
    seed : int
    """

    count: int = Field(ge=1)
    graft: float = Field(default=0.3, ge=0, le=1)
    mutations: float = Field(default=2.0, ge=0)
    cdr_mutations: float = Field(default=3.0, ge=0)
    seed: int = 0


@dataclass(frozen=True)
class Domain:
    """A variable domain cut into FR1, CDR1, FR2, CDR2, FR3, CDR3, FR4 (IMGT); ``kind`` is heavy, kappa or lambda."""

    kind: str
    regions: tuple[str, ...]

    @property
    def sequence(self) -> str:
        """All regions."""
        return "".join(self.regions)

    @property
    def cdr(self) -> str:
        """A digit per residue: 0 framework, 1 to 3 the CDR."""
        return "".join(str((i + 1) // 2 if i in CDRS else 0) * len(part) for i, part in enumerate(self.regions))


def parse_domain(sequence: str) -> Domain | None:
    """Regions of a variable domain; None if it is none or one of its CDRs is empty."""
    check = check_variable_domain(sequence)
    if not check.is_variable:
        return None
    runs = groupby(zip(sequence, check.cdr, strict=True), key=lambda residue: residue[1])
    regions = tuple("".join(letter for letter, _ in run) for _, run in runs)
    return Domain(best_hit(sequence).profile.name, regions) if len(regions) == 7 else None


def derive_pairs(
    heavy: Sequence[str], light: Sequence[str], held_out: Sequence[HeavyChain], settings: Derivation
) -> tuple[list[Pair], dict[str, int]]:
    """Draw pairs until enough pass the checks.

    Parameters
    ----------
    heavy, light : sequence of str
        Domains to start from; those whose regions are not found are passed over.
    held_out : sequence of HeavyChain
        What no derived domain may share a cluster with (:meth:`HeldOut.leak`).
    settings : Derivation

    Returns
    -------
    pairs : list of Pair
        With source ``derived``, the same for the same arguments; no two with the same sequences.
    dropped : dict of str to int
        Draws that failed, by reason.

    Raises
    ------
    ValueError
        If there is no heavy or no light domain, or too many draws fail.
    """
    heavy_domains, light_domains = _domains(heavy), _domains(light)
    if not heavy_domains or not light_domains:
        raise ValueError("nothing to derive pairs from: no variable domain among the heavy or the light chains")
    makers = _Maker(heavy_domains, settings), _Maker(light_domains, settings)
    rng, domains = np.random.default_rng(settings.seed), HeldOut(held_out)
    pairs: list[Pair] = []
    seen: set[tuple[str, str]] = set()
    dropped = {"duplicate": 0, "not_variable_domains": 0, "leak_by_cdr3": 0, "leak_by_domain": 0}
    for _ in range(MOST_DRAWS * settings.count):
        if len(pairs) == settings.count:
            break
        vh, vl = (maker.draw(rng) for maker in makers)
        name, key = f"derived{len(pairs)}", (vh.sequence, vl.sequence)
        checks = check_variable_domain(vh.sequence), check_variable_domain(vl.sequence)
        pair = Pair(name, *key, vh.regions[5], DERIVED_SOURCE, checks[0].cdr + checks[1].cdr)
        if key in seen:
            dropped["duplicate"] += 1
        elif [check.chain_type for check in checks if check.is_variable] != ["H", "L"]:
            dropped["not_variable_domains"] += 1
        elif leak := domains.leak(heavy_chain(pair)):
            dropped[f"leak_by_{leak.by}"] += 1
        else:
            pairs.append(pair)
        seen.add(key)
    else:
        if len(pairs) < settings.count:
            raise ValueError(f"only {len(pairs)} of {settings.count} derived pairs passed ({dropped}); ask for fewer")
    return pairs, dropped


def heavy_chain(pair: Pair) -> HeavyChain:
    """VH and CDR-H3 of a pair, by its source's annotation and by ours."""
    cdr = pair.cdr or check_variable_domain(pair.vh).cdr
    return annotated_chain(pair.id, pair.vh, [cdr], [pair.cdrh3])


def _domains(sequences: Sequence[str]) -> list[Domain]:
    parsed = (parse_domain(sequence) for sequence in sorted(set(sequences)))
    return [domain for domain in parsed if domain is not None]


class _Maker:
    """New domains of one chain type."""

    def __init__(self, domains: Sequence[Domain], settings: Derivation) -> None:
        self.domains, self.settings = domains, settings
        self._substitutes = _substitutes()
        self._donors: dict[tuple[str, int, int], list[str]] = {}
        for domain in domains:
            for place in CDRS:
                self._donors.setdefault(self._slot(domain, place), []).append(domain.regions[place])

    def draw(self, rng: np.random.Generator) -> Domain:
        domain = self.domains[int(rng.integers(len(self.domains)))]
        regions = list(domain.regions)
        for place in CDRS:
            if rng.random() < self.settings.graft:
                donors = self._donors[self._slot(domain, place)]
                regions[place] = donors[rng.integers(len(donors))]
        return self._mutated(Domain(domain.kind, tuple(regions)), rng)

    def _slot(self, domain: Domain, place: int) -> tuple[str, int, int]:
        """CDR 3 of any length fits, since its length is what varies most in nature."""
        return domain.kind, place, 0 if place == CDRS[-1] else len(domain.regions[place])

    def _mutated(self, domain: Domain, rng: np.random.Generator) -> Domain:
        letters = list(domain.sequence)
        chance = np.where(np.array(list(domain.cdr)) == "0", 1.0, self.settings.cdr_mutations)
        chance[[letter in CONSERVED for letter in letters]] = 0
        count = min(rng.poisson(self.settings.mutations), int((chance > 0).sum()))
        for place in rng.choice(len(letters), size=count, replace=False, p=chance / chance.sum()):
            letters[place] = RESTYPES[rng.choice(len(RESTYPES), p=self._substitutes[RESTYPES.index(letters[place])])]
        ends = np.cumsum([len(region) for region in domain.regions])
        cut = np.split(np.array(letters), ends[:-1])
        return Domain(domain.kind, tuple("".join(part) for part in cut))


def _substitutes() -> np.ndarray:
    """Probability of each other residue in place of one, ``[20, 20]``, by the odds of BLOSUM62 (half bits)."""
    blosum = substitution_matrices.load("BLOSUM62")
    odds = np.array([[2.0 ** (blosum[a, b] / 2) for b in RESTYPES] for a in RESTYPES])
    np.fill_diagonal(odds, 0)
    odds[:, [RESTYPES.index(letter) for letter in CONSERVED]] = 0
    return odds / odds.sum(axis=1, keepdims=True)
