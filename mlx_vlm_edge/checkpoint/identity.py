"""A checkpoint's folder -> a name that changes when the model in it does."""

import hashlib
import json
from pathlib import Path

from .config import read_config
from .files import weight_files


def identity(folder: Path) -> str:
    """16 hexadecimal digits: others when the config changes or a file of weights is replaced.

    Names, sizes and times of the files, since reading gigabytes would take longer than answering.
    """
    files = [path.resolve() for path in weight_files(folder)]
    weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    told = json.dumps([read_config(folder), weights], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
