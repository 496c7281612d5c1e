"""Let unit tests import the collection from the checkout, as ansible itself does."""

import os
from pathlib import Path

import hypothesis
from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder

ROOT = Path(__file__).resolve().parents[2]

_AnsibleCollectionFinder(paths=[str(ROOT / ".collections")])._install()

# A busy machine makes any example slow; that says nothing of the code. The same examples each time, so that a change is judged
# by what it does; make soak looks for new ones (HYPOTHESIS_PROFILE=new).
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("new", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
