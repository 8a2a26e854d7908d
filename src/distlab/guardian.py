"""End a job whose parent is gone.

Started beside each job by `distlab.process`, it waits for its standard input to close. The
kernel closes that pipe however the parent ends, SIGKILL included.
"""

import sys

from distlab.process import end_marked

if __name__ == "__main__":
    sys.stdin.read()
    end_marked(sys.argv[1])
