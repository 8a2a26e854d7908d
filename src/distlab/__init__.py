"""The lab bench that all chapters of *Modern Distributed AI Systems* share.

A chapter's script imports what a reader would otherwise read again in every file: the process
group (`runtime`), the model and its data (`model`, `data`), the book's formulas (`predict`),
what this machine is (`hardware`), and how a run is measured, checked and recorded (`measure`,
`check`, `record`, `script`).
"""

import os
import sys

from distlab.display import make_output_safe
from distlab.files import have_caches
from distlab.host import reach_itself

# Here, since every script, worker and command comes this way.
make_output_safe()
reach_itself()
if (_told := have_caches()) and os.environ.get("RANK", "0") == "0":
    print(f"note: {_told}", file=sys.stderr)
