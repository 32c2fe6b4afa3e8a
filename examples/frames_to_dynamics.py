# %% [markdown]
# # My DFT frames to a trusted simulation in 15 minutes
#
# You have frames with energies and forces from an electronic-structure code, and you want a potential that can be trusted
# in molecular dynamics. This tutorial goes the whole way on the ethanol trajectory that comes with gossamer: 301 frames of one molecule at
# 500 K, 20 fs apart, labelled by GFN2-xTB, which stands for your DFT code. Start it in the root of the checkout. For your own frames, change `DATA` and `TEMPERATURE`.

# %%
from pathlib import Path

import ase.io
import numpy as np

import gossamer

DATA, TEMPERATURE = "demo/data/ethanol_500K.extxyz.xz", 500  # K
OUT = "runs/ethanol"
Path("runs").mkdir(exist_ok=True)

# %% [markdown]
# ## 1. Are the labels right?
#
# A potential learns what the file says, wrong units and signs too. `inspect` looks before anything is trained: does the energy
# change as the forces say, are frames repeated, do atoms overlap, is a label missing?

# %%
report = gossamer.inspect(DATA)
for name, fact in report.facts.items():
    print(f"{name}: {fact}")
print("warnings:", report.warnings, " errors:", report.errors)

# %% [markdown]
# `errors` would stop the training: look up the message in [Data](../data.md), which has the units, signs and names that can be set.
#
# ## 2. Keep the end aside
#
# Frames of one trajectory resemble their neighbours. A random choice of test frames would put each test frame between two that were
# trained on, and the error would look too good. So the last fifth of the *time* is the test.

# %%
frames = ase.io.read(DATA, ":")
train, test = frames[:240], frames[240:]
ase.io.write(f"{OUT}-train.extxyz", train)
ase.io.write(f"{OUT}-test.extxyz", test)

# %% [markdown]
# ## 3. Train
#
# `gossamer fit runs/ethanol-train.extxyz --minutes 5` would choose all settings by itself and end by the clock. Here they are written out, with a number of steps, so that
# the same potential comes out on every machine like this one. Everything else has a [default](../settings.md).

# %%
result = gossamer.train(
    {
        "data": {"train": f"{OUT}-train.extxyz", "valid_fraction": 0.1, "split": "random"},
        "model": {"name": "leignn"},
        "loss": {"energy": 5.0, "forces": 10.0},
        "training": {"steps": 1500, "batch_size": 8, "learning_rate": 5e-3, "valid_every": 300},
        "out": OUT,
    },
    progress=False,
)
print(f"{result['num_parameters']:,} parameters, {result['steps']:,} steps of {result['step_ms']:.0f} ms")

# %% [markdown]
# The folder holds `potential.safetensors`, every setting in `config.yaml`, the course of training in `log.csv`, and a checkpoint, from
# which a run that was killed goes on.
#
# ## 4. How wrong is it on frames it never saw?
#
# An error means something beside the size of what is predicted.

# %%
from gossamer.checks.run_page import plot_parity  # noqa: E402

errors = gossamer.evaluate(f"{OUT}/potential.safetensors", f"{OUT}-test.extxyz", out=f"{OUT}/test")
labels, predictions = np.concatenate(errors.components, axis=1)
size = 1000 * np.sqrt((labels**2).mean())
print(f"energy   {errors.energy.mae:.2f} meV/atom on {len(errors.frames)} test frames")
print(f"forces   {errors.forces.mae:.1f} meV/Å, mean absolute; {errors.forces.rmse:.1f} meV/Å, root mean square")
print(f"         {100 * errors.forces.rmse / size:.1f} % of the forces' own root mean square, {size:.0f} meV/Å")
plot_parity(labels, predictions, "eV/Å").savefig("parity.png", dpi=110)

# %% [markdown]
# As a rule of the [judge](../judge.md), up to 15 % passes and above 50 % is no potential. The frames with the largest errors are in
# `runs/ethanol/test/worst.extxyz`: look at them first when the error is too large.
#
# ## 5. Is it a potential at all?
#
# Small errors on frames do not make a potential. In a simulation forces must be the gradient of one smooth energy; else heat comes
# from nowhere. In float64 the gradient is compared with finite differences, and a simulation at constant energy is run at two time
# steps: the fluctuation of the energy must fall by 4 when the step is halved.

# %%
from gossamer.checks.conservation import force_gradient_error, nve_conservation  # noqa: E402

exact = gossamer.Calculator(gossamer.load(f"{OUT}/potential.safetensors", dtype="float64"))
print(f"forces against finite differences: {force_gradient_error(exact, test[0]):.0e} eV/Å")
nve = nve_conservation(exact, test[0], temperature=TEMPERATURE, timestep=0.25, picoseconds=0.25)
print(
    f"drift {nve['drift_meV_per_atom_per_ps']:+.3f} ± {nve['drift_error']:.3f} meV/atom/ps; fluctuations fall by {nve['fluctuation_ratio']:.2f}"
)

# %% [markdown]
# ## 6. Simulate
#
# Four picoseconds at the temperature of the reference (which has six). The run is written frame by frame, can be
# continued (`resume=True`), and stops by itself when it leaves sanity: `broken` would say why.

# %%
run = gossamer.md(
    f"{OUT}/potential.safetensors",
    test[0],
    temperature=TEMPERATURE,
    ensemble="langevin",
    timestep=0.5,
    steps=8_000,
    interval=20,
    out=f"{OUT}/md",
    progress=False,
)
print(f"{run['time_ps']:g} ps in {run['seconds']:.0f} s, mean temperature {run['mean_temperature_K']:.0f} K, broken: {run['broken']}")

# %% [markdown]
# The temperature of nine atoms fluctuates by 144 K (T √(2/24), 24 moving degrees of freedom), and a few picoseconds hold few independent values: a mean 45 K off would be no finding yet.
#
# ## 7. Does it visit what the reference visits?
#
# The distribution h(r) of all distances in the molecule, from the simulation and from the reference. The reference is short, so its own two
# halves differ too: that is the scale on which the difference is to be read.

# %%
from gossamer.checks.liquids import distance_distribution  # noqa: E402
from gossamer.checks.run_page import plot_curves  # noqa: E402

simulated = ase.io.read(f"{OUT}/md/trajectory.traj", "50:")  # the first half picosecond settles
r, h = distance_distribution(simulated, 5.0, 100)
_, reference = distance_distribution(frames, 5.0, 100)
halves = [distance_distribution(half, 5.0, 100)[1] for half in (frames[:150], frames[150:])]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The part of its area by which one distribution differs from the other."""
    return 0.5 * float(np.abs(a - b).mean() * 5.0)


print(
    f"simulation and reference differ by {100 * difference(h, reference):.1f} % of the area, the reference's halves by {100 * difference(*halves):.1f} %"
)
plot_curves(r, [(h, "simulation")], "r, Å", "h(r), 1/Å", (r, reference, "reference")).savefig("distances.png", dpi=110)

# %% [markdown]
# ## What this is worth, and what it is not
#
# If every number above is as it should be, the potential can be trusted for what was looked at: this molecule, near this temperature, for properties that follow from
# its structure. It has seen no other conformations, no broken bond and no second molecule. Before you rely on it further:
#
# - label twenty frames of `runs/ethanol/md/trajectory.traj` with your own code, `evaluate` on them, and train on them too if the errors are larger
#   than on the test frames (`gossamer fit more.extxyz --start runs/ethanol/potential.safetensors --replay runs/ethanol-train.extxyz`);
# - let `gossamer judge runs/ethanol/potential.safetensors --data runs/ethanol-test.extxyz` look at everything else, as the
#   [next tutorial](fit_for_use.md) does;
# - train longer: 1,500 steps are the beginning of the learning curve ([Training](../training.md)).
