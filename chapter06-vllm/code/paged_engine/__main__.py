"""`python -m paged_engine --model DIR`: the OpenAI-compatible server (see server.py)."""

from distlab import script
from paged_engine.server import main

if __name__ == "__main__":
    script.exit(main)
