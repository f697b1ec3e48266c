"""Make clbench/data/digits_split.json: the frozen, stratified split of scikit-learn's digits (1437 train, 360 test).

Run once; the list is shipped, so the split never changes with a version of scikit-learn. Prints the sizes.
"""

import json
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

_, labels = load_digits(return_X_y=True)
train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
content = {
    "version": 1,
    "rows": len(labels),
    "label_checksum": int(labels @ np.arange(len(labels))),  # notices another order or other labels
    "test": sorted(int(i) for i in test),
}
path = Path(__file__).resolve().parents[1] / "clbench" / "data" / "digits_split.json"
path.write_text(json.dumps(content) + "\n")
print(f"{path.name}: {len(train)} train, {len(test)} test, tests per class {np.bincount(labels[test]).tolist()}")
