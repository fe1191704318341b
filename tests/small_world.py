"""The files that README, docs and examples name, small: a model folder, scans, labels, an fMRIPrep folder, configs."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import yaml
from conftest import build_tiny_language_model, build_tiny_tokenizer, save_tiny

from fmrilm.processors import Atlas, FmriLMFeatureExtractor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES, CORE_NAMES
from helpers import confounds_table, evaluation_results, slow_series
from official_checkpoint import WIDTH, brain_tensors, language_tensors


ATLAS, TR, FRAMES = "aal2-94", 0.72, 120
# of the demo's model
ATLASES = (ATLAS, "schaefer-100-7networks", "schaefer-400-7networks")
# cb2, cb3, hm04 and hm05 are held out everywhere; of them, and of the others, there are both sexes
SUBJECTS = 6
CONFIGS = Path(__file__).parents[1] / "training" / "configs"
# what makes runs of the programs' own configurations short
SHORT_RUNS = {
    "codec": {
        "window_length": 32,
        "mixtures": 8,
        "tokens_per_patch": 2,
        "num_quantizers": 2,
        "codebook_size": 8,
        "codebook_dim": 8,
        "codebook_groups": 2,
        "num_basis_functions": 8,
        "start_steps": 2,
    },
    "alignment": {
        "model_name_or_path": "qwen3",
        "max_steps": 1,
        "mixtures": 8,
        "rows": 4,
        "questions": 2,
        "statements": 2,
        "lora_r": 2,
    },
    "sft": {"max_steps": 1, "mixtures": 0, "rows": 4, "questions": 2, "statements": 2, "lora_r": 2},
}
# 6 mm voxels in MNI space; at 8 mm a parcel of Schaefer-400 has none
GRID = (31, 37, 31)
AFFINE = np.array([[6.0, 0, 0, -90], [0, 6, 0, -126], [0, 0, 6, -72], [0, 0, 0, 1]])


def write_small_world(folder: Path) -> Path:
    """Fills a folder; returns it."""
    write_model(folder / "runs" / "demo" / "model")
    (folder / "runs" / "demo" / "results.json").write_text(json.dumps(evaluation_results()))
    write_official_checkpoint(folder / "model.pt")
    np.save(folder / "scan.npy", slow_series(0, FRAMES, len(Atlas.load(ATLAS))).astype(np.float32))
    nib.save(volume(1, TR), folder / "scan.nii.gz")
    write_scans(folder / "scans")
    for number in range(SUBJECTS):
        write_fmriprep(folder / "derivatives" / "fmriprep", number + 1)
    (folder / "recordings").mkdir()
    for path in (folder / "scans").glob("*.npy"):
        shutil.copy(path, folder / "recordings")
    kinds = [f"cb{number + 1},{'FM'[number % 2]},{'mme'[number % 3]}" for number in range(SUBJECTS)]
    (folder / "labels.csv").write_text("\n".join(["subject,sex,chronotype", *kinds]) + "\n")
    labels = [f"sub-hm{number + 1:02}\t{20 + 5 * number}\t{'fm'[number % 2]}" for number in range(SUBJECTS)]
    (folder / "participants.tsv").write_text("\n".join(["participant_id\tage\tsex", *labels]) + "\n")
    write_configs(folder / "training" / "configs" / "demo")
    return folder


def write_model(folder: Path) -> None:
    """A model of random weights with its processor, which knows the atlases of the demo's, and its cohort."""
    atlases = [Atlas.load(name, parcels=True) for name in ATLASES]
    extractor = FmriLMFeatureExtractor(atlases=atlases, window_length=32)
    save_tiny(folder, extractor, scores=CORE_NAMES, patch_length=16)
    descriptors = np.random.default_rng(0).normal(0, 0.3, (SUBJECTS, len(CORE_NAMES)))
    Cohort.fit("the model's training subjects", CORE_MEASURES, descriptors, SUBJECTS, atlases).save(folder)


def write_official_checkpoint(path: Path) -> None:
    """A random checkpoint of the released layout for the 450 official ROIs; its language model beside it."""
    tokenizer, backbone = build_tiny_tokenizer(), path.with_name("qwen3")
    model = build_tiny_language_model("qwen3", len(tokenizer) + 4)
    model.save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    tensors = brain_tensors("released", 160, WIDTH)
    for name in ("tokenizer.encoder.pos_embed", "pos_embed.weight"):
        tensors[name] = torch.randn(*tensors[name].shape[:-2], 450, tensors[name].shape[-1])
    tensors |= language_tensors(model, "llm.", None)[0]
    torch.save({**tensors, "model_args": Namespace(lm_name=str(backbone))}, path)


def write_configs(folder: Path) -> None:
    """The demo's configurations for runs of a step on a tiny language model."""
    folder.mkdir(parents=True)
    for name, changes in SHORT_RUNS.items():
        values = yaml.safe_load((CONFIGS / "demo" / f"{name}.yaml").read_text()) | changes
        values |= {"per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))


def write_scans(folder: Path) -> None:
    """Scans of AAL2 in .npy files, one a subject, and their manifest with labels."""
    folder.mkdir()
    rows = ["path,subject,tr,atlas,age,sex"]
    for number in range(SUBJECTS):
        name = f"cb{number + 1}"
        np.save(folder / f"{name}.npy", slow_series(number, FRAMES, 94).astype(np.float32))
        rows.append(f"{name}.npy,{name},{TR},{ATLAS},{20 + 5 * number},{'fm'[number % 2]}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def write_fmriprep(folder: Path, number: int) -> None:
    subject = f"sub-hm{number:02}"
    stem = folder / subject / "func" / f"{subject}_task-rest"
    stem.parent.mkdir(parents=True)
    nib.save(volume(number, 2.0), f"{stem}_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    table = confounds_table(number, FRAMES)
    table.to_csv(f"{stem}_desc-confounds_timeseries.tsv", sep="\t", na_rep="n/a", index=False)


def write_parcels(stem: Path) -> None:
    """A label image of two halves of a brain, and its table."""
    labels = np.zeros(GRID, np.int16)
    labels[3:9, 8:20, 8:16], labels[14:20, 8:20, 8:16] = 1, 2
    nib.save(nib.Nifti1Image(labels, AFFINE), f"{stem}.nii.gz")
    stem.with_suffix(".tsv").write_text("index\tname\tnetwork\n1\tLeft\tDefault\n2\tRight\tDefault\n")


def volume(seed: int, tr: float) -> nib.Nifti1Image:
    """A scan of the whole head: slow noise on a large mean."""
    values = slow_series(seed, FRAMES, int(np.prod(GRID))).T.reshape(*GRID, FRAMES)
    image = nib.Nifti1Image(values.astype(np.int16), AFFINE)
    image.header.set_zooms((6, 6, 6, tr))
    image.header.set_xyzt_units("mm", "sec")
    return image
