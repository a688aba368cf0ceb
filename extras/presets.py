"""The settings of papers, by name.

    python -m extras.presets                                   the list, and where each was read
    python -m extras.presets cafm-sit-xl2 --data latents --init SiT-XL-2-256x256.pt --out runs/cafm-xl
    torchrun --nproc_per_node=8 -m extras.presets jit-b16-imagenet256 --data IMAGENET/train --out runs/jit

The settings are printed with their source before training starts, and flags given beside have the last
word. 5,004 steps of 256 images are an epoch of ImageNet. No run of this size was made: not checked yet.
"""
import sys

import data
import train

# what the papers share
PAPERS = dict(decay="constant", warmup=0, clip=0.0, ema=0.9999, weight_decay=0.0, lr=1e-4, batch=256,
              label_drop=0.1, score=0, log_every=100, sample_every=10_000, save_every=10_000)
LATENTS = PAPERS | dict(model="SiT-XL/2", predict="v", size=0)
PIXELS = PAPERS | dict(loss="fm", size=256, batch=1024, warmup=6255, lr=2e-4, beta2=0.95,
                       time="logit_normal", time_mean=0.8, time_std=0.8, steps=750_600)
CAFM = dict(loss="cafm", lr=1e-5, beta1=0.0, beta2=0.95, ema=0.99, d_steps=16, cp=0.001,
            d_lr=0.0, ot=0.0, ot_end=0.0)
AFM = dict(loss="afm", beta1=0.0, beta2=0.9, weight_decay=0.01, label_drop=0.0, gp=0.25, cp=0.01,
           d_lr=0.0, steps=1_000_000)
JUMPS = dict(time="logit_normal", time_std=1.0, jump_time="", jump_low=0.0, jumps=0.25, p=1.0,
             sample_steps=1, steps=1_200_960)
ALIGNED = dict(time="uniform", clip=1.0, align=0.5, align_block=8, mirror="off", steps=4_000_000)

PRESETS = {  # name: (where its settings were read, the settings)
    "sit-xl2-imagenet256": (
        "SiT, arXiv:2401.08740 and its train.py",
        LATENTS | dict(loss="fm", time="uniform", steps=7_000_000)),
    "jit-b16-imagenet256": (
        "JiT, arXiv:2511.13720 and its main_jit.py",
        PIXELS | dict(model="JiT-B/16")),
    "jit-h16-imagenet256": (
        "JiT, arXiv:2511.13720 and its main_jit.py",
        PIXELS | dict(model="JiT-H/16")),
    "cafm-sit-xl2": (
        "CAFM, arXiv:2604.11521, train_cafm_sit.yaml: give --init SiT-XL-2-256.pt",
        LATENTS | CAFM | dict(time="uniform", d_warmup=10_000, steps=50_000)),
    "cafm-jit-h16": (
        "CAFM, arXiv:2604.11521, train_cafm_jit.yaml: give --init of a JiT-H/16 file",
        PIXELS | CAFM | dict(model="JiT-H/16", warmup=0, d_warmup=5000, steps=12_500)),
    "afm-xl2-1nfe": (
        "AFM, arXiv:2511.22475, train_afm_1nfe.yaml and Table 11, stage 1",
        LATENTS | AFM | dict(predict="x", nfe=1, ot=0.2, ot_end=0.005)),
    "afm-xl2-2nfe": (
        "AFM, arXiv:2511.22475, train_afm_multi_nfe.yaml and Table 11, stage 1",
        LATENTS | AFM | dict(nfe=2, ot=0.25, ot_end=0.005, clip=5.0)),
    "afm-xl2-56layer": (
        "AFM, arXiv:2511.22475, train_afm_1nfe_deep.yaml and Table 11, stage 1",
        LATENTS | AFM | dict(loss="afm_more", predict="x", nfe=1, repeats=2, ot=0.2, ot_end=0.005, clip=5.0,
                             augment=0.0, cg=0.003, cg_time=0.1)),
    "meanflow-xl2": (
        "MeanFlow, arXiv:2505.13447, and a PyTorch port's README for omega, kappa",
        LATENTS | JUMPS | dict(loss="meanflow_guided", time_mean=-0.4, beta2=0.95, omega=0.2, kappa=0.92,
                               guide_until=0.75)),
    "repa-xl2": (
        "REPA, arXiv:2410.06940, and its train.py: encode with the features of a DINOv2-B",
        LATENTS | ALIGNED | dict(loss="repa")),
    "reg-xl2": (
        "REG, arXiv:2507.01467, and its train.sh: encode with the features of a DINOv2-B",
        LATENTS | ALIGNED | dict(loss="reg", token=0.03)),
    "soflow-xl2": (
        "SoFlow, arXiv:2512.15657, and its train.py",
        LATENTS | JUMPS | dict(loss="soflow", time_mean=-0.2, beta2=0.99, amp="off", omega=1.0,
                        kappa=0.0, guide_until=1.0)),
}


def settings(name: str) -> dict:
    """The settings of a preset; the loss is one of them."""
    if name not in PRESETS:
        raise ValueError(f"preset {name}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name][1]


def main(argv: list[str] | None = None) -> None:
    name, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "-h", "--help"):
        print(__doc__)
        return print("\n".join(f"{name:>20}  {source}" for name, (source, _) in PRESETS.items()))
    if "--resume" in flags:
        raise ValueError(f"preset {name} with --resume: a run goes on with its own settings: python train.py "
                         "--resume --out RUN")
    cfg = train.read_settings(flags, **settings(name))
    if data.rank() == 0:
        shown = " ".join(f"--{k} {getattr(cfg, k)}" for k in settings(name) if hasattr(cfg, k))
        print(f"{name}, settings of {PRESETS[name][0]}: {shown}")
    train.main(flags, **settings(name))


if __name__ == "__main__":
    data.run_cli(main)
