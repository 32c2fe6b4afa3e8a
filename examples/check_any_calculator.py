"""Is this calculator's energy smooth, symmetric and conserved? Works on any ASE calculator; here EMT on rattled copper."""

from ase.build import bulk
from ase.calculators.emt import EMT

from gossamer.checks.conservation import force_gradient_error, nve_conservation, stress_gradient_error
from gossamer.checks.symmetry import supercell_error, symmetry_errors

atoms = bulk("Cu", cubic=True)
atoms.rattle(0.05, seed=0)
calculator = EMT()
for change, error in symmetry_errors(calculator, atoms).items():
    print(f"{change:16s} {error['relative']:.1e} relative")
print(f"force gradient   {force_gradient_error(calculator, atoms):.1e} eV/Å")
print(f"stress gradient  {stress_gradient_error(calculator, atoms):.1e} eV/Å³")
print(f"supercell        {supercell_error(calculator, atoms):.1e} eV/atom")
print(nve_conservation(calculator, atoms, temperature=300, timestep=2.0, picoseconds=0.5))
