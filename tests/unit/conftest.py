"""Let unit tests import the collection from the checkout, as ansible itself does."""

from pathlib import Path

import hypothesis
from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder

ROOT = Path(__file__).resolve().parents[2]

_AnsibleCollectionFinder(paths=[str(ROOT / ".collections")])._install()

# A busy machine makes any example slow; that says nothing of the code.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")
