"""
Prepare and describe scans on a Dask cluster, fit the codec, then train the language model on several GPUs.

    python examples/cluster.py scans/manifest.csv work --scheduler tcp://head:8786

Without --scheduler, processes of this machine are the cluster. Workers need this package and no shared files. After an
interruption, the same command resumes.
"""

import argparse
import subprocess
from contextlib import ExitStack
from pathlib import Path

from distributed import LocalCluster

from fmrilm.training.codec import program as codec
from fmrilm.training.corpus.describe import CorpusSettings, describe_dataset
from fmrilm.training.corpus.source import load_source
from fmrilm.training.data.prepare import Preparation, prepare
from fmrilm.training.data.scan_sources import find_scans


CONFIGS = Path("training/configs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Manifest, fMRIPrep folder or folder of scans.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--atlas", help="Of scans for which the manifest has none.")
    parser.add_argument("--scheduler", help="Address of a Dask scheduler.")
    parser.add_argument("--configs", type=Path, default=CONFIGS / "release", help="Folder of the stages' settings.")
    parser.add_argument("--accelerate", type=Path, default=CONFIGS / "accelerate" / "fsdp2.yaml")
    options = parser.parse_args()
    prepared, corpus, fitted = (options.output / name for name in ("prepared", "corpus", "codec"))

    with ExitStack() as stack:
        scheduler = options.scheduler or stack.enter_context(LocalCluster(threads_per_worker=1)).scheduler_address
        outcome = prepare(find_scans(options.source), prepared, options.atlas, Preparation(), scheduler=scheduler)
        print(f"{outcome.prepared} prepared, {outcome.skipped} done before, {outcome.failed} failed")
        if not corpus.exists():
            described = describe_dataset(load_source(str(prepared)), corpus, CorpusSettings(), scheduler=scheduler)
            print(f"{described.scans} described")

    config = str(options.configs / "codec.yaml")
    if not (fitted / "model").exists():
        codec.main(["--config", config, "--data", str(prepared), "--output_dir", str(fitted)])
    # a process for each GPU, weights sharded over them
    launch = ["accelerate", "launch", "--config_file", str(options.accelerate)]
    run = ["-m", "fmrilm.training.alignment.program", "--config", str(options.configs / "alignment.yaml")]
    run += ["--codec", str(fitted / "model"), "--data", str(corpus), "--output_dir", str(options.output / "alignment")]
    subprocess.run([*launch, *run], check=True)


# worker processes import this file
if __name__ == "__main__":
    main()
