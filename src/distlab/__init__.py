"""The lab bench that all chapters of *Modern Distributed AI Systems* share.

A chapter's script imports what a reader would otherwise read again in every file: the process
group (`runtime`), the model and its data (`model`, `data`), the book's formulas (`predict`),
what this machine is (`hardware`), and how a run is measured, checked and recorded (`measure`,
`check`, `record`, `script`).
"""

from distlab.display import make_output_safe

make_output_safe()  # here, since every script, worker and command comes this way
