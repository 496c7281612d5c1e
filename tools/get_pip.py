"""Stands in for get-pip.py in ansible-test's virtual environments: pip comes from ensurepip, updates from the index."""

import os
import subprocess
import sys

os.environ.pop("GET_PIP", None)
subprocess.run([sys.executable, "-m", "ensurepip"], check=True)
words = [word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")]
if words:
    subprocess.run([sys.executable, "-m", "pip", "install", *words], check=True)
