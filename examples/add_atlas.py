"""
Read scans in a parcellation of your own, and save a model that knows it.

    python examples/add_atlas.py runs/demo/model parcels.nii.gz parcels.tsv scan.nii.gz --output my-model

The label image is in MNI space; the table (tab-separated) names its labels: columns index, name, network.
"""

import argparse

import fmrilm
from fmrilm import Atlas, FmriLMFeatureExtractor, FmriLMProcessor


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Folder or Hub id.")
parser.add_argument("label_image")
parser.add_argument("table")
parser.add_argument("scan", help="A volume in MNI space.")
parser.add_argument("--tr", type=float, help="Seconds between two frames, if the header does not say.")
parser.add_argument("--output", help="Folder for a model that knows the atlas.")
options = parser.parse_args()

atlas = Atlas.from_image(options.label_image, options.table)
reader = fmrilm.load(options.model)
signal = reader.signal(options.scan, tr=options.tr, atlas=atlas)
codes = reader.tokenize(options.scan, tr=options.tr, atlas=atlas)
print(f"{atlas}: signal {signal.shape}, codes {codes.shape}")

if options.output:
    # the atlas travels with the processor, its parcels included
    old = reader.processor.feature_extractor
    known = [old.atlas(entry["name"]) for entry in old.atlases]
    extractor = FmriLMFeatureExtractor(**{**old.to_dict(), "atlases": [*known, atlas]})
    processor = FmriLMProcessor(
        extractor, reader.processor.tokenizer, reader.processor.tokens_per_patch, reader.processor.summary_tokens
    )
    reader.model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    again = fmrilm.load(options.output).tokenize(options.scan, tr=options.tr, atlas=atlas.name)
    same = "the same codes" if (again == codes).all() else "other codes"
    print(f"{options.output} reads the scan with atlas={atlas.name!r}: {same}")
