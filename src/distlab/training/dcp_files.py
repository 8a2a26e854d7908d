"""torch.distributed.checkpoint's files, read without running what is in them.

DCP's `.metadata` is a pickle, and an unpickler calls whatever a pickle names. This one may name
DCP's own types, and no other.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

METADATA = ".metadata"
PICKLED = re.compile(  # what DCP's metadata consists of
    r"torch (Size|float\w+|bfloat16|u?int\d+|bool|complex\d+|strided)|pathlib \w*Path"
    r"|torch\.serialization _get_layout|torch\.distributed\.checkpoint\.\w+ \w+"
)


class Reader(dcp.FileSystemReader):
    """DCP's reader of files, with a narrow unpickler.

    Raises `pickle.UnpicklingError` for a pickle of anything else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            metadata: Metadata = Unpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not PICKLED.fullmatch(f"{module} {name}"):
            raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which is not DCP's")
        return super().find_class(module, name)
