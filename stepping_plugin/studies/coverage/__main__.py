"""The process of one model: reads a spec (JSON) from its argument, prints the row so far after every stage."""

import json
import resource
import sys
import warnings

import torch

from .check import check
from .specs import Spec


def main(text: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for row in check(Spec(**json.loads(text))):
        row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        print(json.dumps(row), flush=True)


main(sys.argv[1])
