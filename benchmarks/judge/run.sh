#!/usr/bin/env bash
# Reports of our trained potentials and of other people's, made with one command each; see README.md.
#   OURS    python with gossamer, tblite and matscipy        THEIRS  python with gossamer, chgnet and sevenn
#   PUBLISHED  folder of sevenn's own potentials (pretrained_potentials of the installed package), for `imported`, and with it
#   POTENTIALS, SYSTEMS, PICOSECONDS  which of them, on which of Si, Cu, NaCl and water, and how long, if not all three for 1 ps
#   RUNS    folder of `benchmarks/accuracy/compare.py`       DATA    folder of the reference data        OUT  where reports go
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
: "${OURS:?}" "${THEIRS:?}" "${RUNS:?}" "${DATA:?}" "${OUT:?}"
export OMP_NUM_THREADS=1 PYTHONPATH="$HERE${PYTHONPATH:+:$PYTHONPATH}" PYTHONWARNINGS=ignore
judge() { local python=$1; shift; "$python" -m gossamer.cli judge "$@" || test $? = 1; }
mkdir -p "$OUT"
CHGNET="CHGNet=chgnet.model.dynamics:CHGNetCalculator(use_device='cpu')"
SEVENNET="SevenNet-0=sevenn.calculator:SevenNetCalculator(model='7net-0', device='cpu')"

silicon() {
    "$OURS" -c "from ase.build import bulk; a = bulk('Si', cubic=True); a.write('$OUT/Si8.extxyz'); a.repeat(2).write('$OUT/Si64.extxyz')"
    local on=(--out "$OUT/silicon" --structures "$OUT/Si8.extxyz" --systems "$OUT/Si64.extxyz" --elements Si --timestep 1 --picoseconds 1 --data "$DATA/mlearn/mlearn_Si_test.extxyz.xz")
    judge "$OURS" "NequIP=$RUNS/silicon-6min/nequip/potential.safetensors" "Geodite=$RUNS/silicon-6min/geodite/potential.safetensors" \
        "LEIGNN=$RUNS/silicon-6min/leignn/potential.safetensors" --calculator Tersoff=potentials:tersoff --calculator Stillinger-Weber=potentials:stillinger_weber "${on[@]}"
    judge "$THEIRS" --calculator "$CHGNET" --calculator "$SEVENNET" "${on[@]}"
}
ethanol() {
    judge "$OURS" "NequIP=$RUNS/ethanol-25min/nequip/potential.safetensors" "Geodite=$RUNS/ethanol-25min/geodite/potential.safetensors" \
        --calculator "GFN2-xTB=tblite.ase:TBLite(verbosity=0)" --elements H C O --out "$OUT/ethanol" --structures "$DATA/rmd17/rmd17_ethanol_test.extxyz.xz" \
        --data "$DATA/rmd17/rmd17_ethanol_test.extxyz.xz" --protocol molecule --references "$DATA/rmd17/rmd17_ethanol_train.extxyz.xz" --picoseconds 2 --all-pairs
}
water() {
    judge "$OURS" "NequIP=$RUNS/water-2.5min/nequip/potential.safetensors" "LEIGNN=$RUNS/water-2.5min/leignn/potential.safetensors" --out "$OUT/water" \
        --structures "$DATA/water_pbe0ts_330K/water_pbe0ts_test.extxyz.xz" --data "$DATA/water_pbe0ts_330K/water_pbe0ts_test.extxyz.xz" \
        --protocol water --temperature 330 --references "$DATA/water_pbe0ts_330K/water_pbe0ts_train.extxyz.xz" --picoseconds 2 --all-pairs
}
conductivity() {
    judge "$THEIRS" --calculator "$CHGNET" --calculator "$SEVENNET" --elements Mg O Li F Na Cl Ga As Be S Zn Al P B N Si C --out "$OUT/conductivity" --only conductivity \
        --conductivity-crystals "$DATA/phonondb103/phonondb103_structures.extxyz.xz" \
        --conductivity-reference "$DATA/phonondb103/phonondb103_kappa_pbe_ref82.json.xz" --conductivity-count "${COUNT:-3}"
}
imported() {
    : "${PUBLISHED:?}"
    local files=() name what
    bring() { test -e "$2" || "$OURS" -m gossamer.cli import "$PUBLISHED/$1" --out "$2" --reference "$THEIRS" --elements Na,Cl,Si,Cu,H,O "${@:3}"; }
    for name in ${POTENTIALS:-SevenNet-0 SevenNet-l3i5 SevenNet-MF-0}; do
        case $name in
            SevenNet-0) bring SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth "$OUT/$name.safetensors" ;;
            SevenNet-l3i5) bring SevenNet_l3i5/checkpoint_l3i5.pth "$OUT/$name.safetensors" ;;
            SevenNet-MF-0) bring SevenNet_MF_0/checkpoint_sevennet_mf_0.pth "$OUT/$name.safetensors" --modal PBE ;;
        esac
        files+=("$name=$OUT/$name.safetensors")
    done
    "$OURS" -c "
from ase.build import bulk
for name, atoms in {'Si': bulk('Si', cubic=True), 'Cu': bulk('Cu', cubic=True), 'NaCl': bulk('NaCl', 'rocksalt', a=5.64, cubic=True)}.items():
    atoms.write(f'$OUT/{name}.extxyz'); atoms.repeat(2).write(f'$OUT/{name}-2.extxyz')"
    for what in ${SYSTEMS:-Si Cu NaCl water}; do
        local on=(--out "$OUT/imported-$what" --way kernels --picoseconds "${PICOSECONDS:-1}")
        case $what in
            water)
                on+=(--elements H O --structures "$DATA/water_pbe0ts_330K/water_pbe0ts_test.extxyz.xz" --data "$DATA/water_pbe0ts_330K/water_pbe0ts_test.extxyz.xz"
                    --protocol water --temperature 330 --references "$DATA/water_pbe0ts_330K/water_pbe0ts_train.extxyz.xz" --all-pairs) ;;
            *) on+=(--structures "$OUT/$what.extxyz" --crystals "$OUT/$what.extxyz" --systems "$OUT/$what-2.extxyz" --timestep 1) ;;&
            NaCl) on+=(--elements Na Cl --all-pairs) ;;
            Si | Cu) on+=(--elements "$what" --data "$DATA/mlearn/mlearn_${what}_test.extxyz.xz") ;;
        esac
        judge "$OURS" "${files[@]}" "${on[@]}"
    done
}
for what in "${@:-silicon}"; do "$what"; done
