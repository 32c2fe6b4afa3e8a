"""Classical potentials of silicon from well-kept packages, as factories for `gossamer judge --calculator`."""

from __future__ import annotations

from ase.calculators.calculator import Calculator  # says to the judge that the functions here make calculators


def tersoff() -> Calculator:
    """Tersoff's third parameter set, Phys. Rev. B 38, 9902 (1988), by ASE."""
    from ase.calculators.tersoff import Tersoff, TersoffParameters

    return Tersoff({("Si", "Si", "Si"): TersoffParameters(
        A=1830.8, B=471.18, lambda1=2.4799, lambda2=1.7322, lambda3=0.0, beta=1.1e-6, gamma=1.0, m=3.0, n=0.78734, c=1.0039e5, d=16.217, h=-0.59825,
        R=2.85, D=0.15)})  # fmt: skip


def stillinger_weber() -> Calculator:
    """Stillinger and Weber, Phys. Rev. B 31, 5262 (1985), by matscipy."""
    from matscipy.calculators.manybody import Manybody
    from matscipy.calculators.manybody.explicit_forms.stillinger_weber import Stillinger_Weber_PRB_31_5262_Si, StillingerWeber

    return Manybody(**StillingerWeber(Stillinger_Weber_PRB_31_5262_Si))
