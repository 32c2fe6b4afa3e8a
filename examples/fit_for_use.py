# %% [markdown]
# # Is this potential fit for use?
#
# Fit for *which* use? A potential may be good for a liquid, less good for a hotter one, and nonsense for two atoms alone. Here a potential of liquid water is
# judged, its verdict read, the use changed, and the potential mended for it: on the data that comes with gossamer, 32 D2O in a box, labelled by
# GFN1-xTB. Start it in the root of the checkout. To judge a potential of your own, or anyone's ASE calculator, begin at section 2.

# %%
from pathlib import Path

import ase.io
import numpy as np

import gossamer

OUT = "runs/water"
Path("runs").mkdir(exist_ok=True)

# %% [markdown]
# ## 1. Somebody's potential
#
# A small one, trained for 600 steps on the first three quarters of a trajectory at 350 K. The last quarter was kept aside.

# %%
frames = ase.io.read("demo/data/water_liquid_350K.extxyz.xz", ":")
train, late = frames[:300:2], frames[300::4]
ase.io.write(f"{OUT}-train.extxyz", train)
ase.io.write(f"{OUT}-late.extxyz", late)
settings = {
    "data": {"train": f"{OUT}-train.extxyz", "valid_fraction": 0.1},
    "model": {"name": "leignn", "num_features": 48, "num_layers": 2, "cutoff": 4.5},
    "loss": {"energy": 1.0, "forces": 10.0},
    "training": {"steps": 600, "batch_size": 2, "learning_rate": 5e-3, "valid_every": 100},
    "out": OUT,
}
gossamer.train(settings, progress=False)
potential = f"{OUT}/potential.safetensors"

# %% [markdown]
# ## 2. The judge
#
# One call, or `gossamer judge runs/water/potential.safetensors --data runs/water-late.extxyz --temperature 350`. Any ASE calculator can stand in
# place of the file. Simulations and the time are left out here, since the [first tutorial](frames_to_dynamics.md) is about them. The answer is a verdict for each check, and the worst number of each with what to expect of it; the page
# `runs/water-verdict/report.html` shows the same with pictures.

# %%
verdict = gossamer.judge(
    potential,
    structures=f"{OUT}-late.extxyz",
    data=f"{OUT}-late.extxyz",
    temperature=350,
    skip=["conservation", "dynamics", "speed"],
    out=f"{OUT}-verdict",
    progress=False,
)
for check, found in next(iter(verdict.values())).items():
    print(f"{check:13s} {found.status:9s} {found.reason}")
    if found.consequence:
        print(f"{'':23s} -> {found.consequence}")

# %% [markdown]
# Read it from the top: a failure is not always a reason to throw the potential away, but each says what will go wrong, so that you can tell whether it matters
# for you. What was not measured (`skipped`) is not known.
#
# ## 3. Ask for more where it matters
#
# Every measurement is a function that takes any ASE calculator ([Checks](../checks.md)). Two oxygen atoms, say, down to where they never come in the liquid:

# %%
from gossamer.checks.diatomics import dimer_curve  # noqa: E402
from gossamer.checks.run_page import plot_curves  # noqa: E402

calculator = gossamer.Calculator(gossamer.load(potential))
distances = np.linspace(0.8, 4.0, 120)
energies, _ = dimer_curve(calculator, "O", "O", distances)
plot_curves(distances, [(energies - energies[-1], "O-O")], "r, Å", "E, eV").savefig("dimer.png", dpi=110)
print(f"energy of O-O at 1.0 Å above that at 4.0 Å: {np.interp(1.0, distances, energies - energies[-1]):.1f} eV")

# %% [markdown]
# Below 2.5 Å, where the liquid has no two oxygen atoms, nothing was learned: what is there is the repulsion that our potentials stand on (ZBL, which begins where the data ends), so that atoms of a
# start built by hand part again. The judge passes that shape. It cannot know that two free oxygen atoms bind at 1.2 Å: for O2 this potential is not fit, and no verdict says so.
#
# ## 4. Another use: 600 K
#
# The same potential on 31 frames of the same box at 600 K, which it never saw, beside the frames at 350 K.

# %%
hot = ase.io.read("demo/data/water_hot_600K.extxyz.xz", ":")
new, unseen = hot[::2], hot[1::2]
ase.io.write(f"{OUT}-hot-new.extxyz", new)
ase.io.write(f"{OUT}-hot-test.extxyz", unseen)


def table(model: str) -> None:
    """Errors at both temperatures."""
    for temperature, file in ((350, "late"), (600, "hot-test")):
        e = gossamer.evaluate(model, f"{OUT}-{file}.extxyz")
        labels = np.concatenate(e.components, axis=1)[0]
        print(
            f"{temperature} K: energy {e.energy.mae:5.2f} meV/atom, forces {e.forces.mae:5.1f} meV/Å, "
            f"{100 * e.forces.rmse / (1000 * np.sqrt((labels**2).mean())):.1f} % of their size"
        )


table(potential)

# %% [markdown]
# ## 5. Mend it
#
# Half of the hot frames are enough to see the way: fine-tuning starts from the potential, and `replay` mixes the old frames in, so that they
# are not forgotten. The other half of the hot frames was kept aside for the table.

# %%
tuning = settings | {
    "data": {"train": f"{OUT}-hot-new.extxyz", "valid_size": 2},
    "finetune": {"start": potential, "replay": f"{OUT}-train.extxyz", "replay_fraction": 0.5},
    "training": {"steps": 200, "batch_size": 2, "learning_rate": 1e-3, "valid_every": 100},
    "out": f"{OUT}-tuned",
}
gossamer.train(tuning, progress=False)
table(f"{OUT}-tuned/potential.safetensors")

# %% [markdown]
# The errors at 600 K were larger by about half and fall by about a fifth; those at 350 K do not rise. The question to end with is the one at the top: fit for which use? Write it down as a temperature, a set of structures and a property, have the judge look at exactly
# those (`--structures`, `--systems`, `--references`, `--temperature`, see [the judge](../judge.md)), and keep its folder beside the potential: it holds every number, and
# `gossamer judge` with the same `--out` puts the next potential beside it.
